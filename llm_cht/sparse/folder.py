"""The sparse model on disk: a plain Hugging Face folder with exact zeros, plus which links exist.

The folder holds nothing of ours that stock ``transformers`` would have to know: the weights are dense tensors whose
missing links are 0, and two small files beside them tell a link whose weight happens to be 0 from a missing one:

- ``topology.safetensors``: layer name -> the bit-packed mask (uint8), in the order of the stored weight;
- ``topology.json``: shapes, counts, preset, step and a digest of all masks; which weights are stored as (in, out).

Rejected: sparse file formats (no stock loader reads them) and masks as buffers of the model (a stock loader would
complain of unexpected keys).
"""

import copy
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_cht.errors import UserError
from llm_cht.files import disk_errors, new_folder
from llm_cht.topology import bits

if TYPE_CHECKING:  # the folder of a model can be read without loading transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1


@dataclass(frozen=True)
class Topology:
    """The links of a model: a bool mask per layer name, in the order of the stored weight, and where they come from."""

    masks: dict[str, Tensor]
    preset: str
    step: int  # optimizer steps done when it was written
    transposed: frozenset[str] = frozenset()
    """layers whose weight is stored as (in, out); the others are (out, in)"""

    @property
    def masks_OI(self) -> dict[str, Tensor]:
        """The layers as networks: every mask (out, in)."""
        return {name: mask.mT.contiguous() if name in self.transposed else mask for name, mask in self.masks.items()}


@dataclass(frozen=True)
class LinkCount:
    """One layer of a model folder: its links, and how many of them have a weight other than 0."""

    links: int
    nonzero: int


# ---- topology files ----


def write_topology(
    folder: Path,
    masks: Mapping[str, Tensor],
    preset: str,
    step: int,
    stem: str = "topology",
    transposed: Collection[str] = (),
) -> None:
    """Write ``STEM.safetensors`` and ``STEM.json`` into an existing folder; for the arguments see ``Topology``."""
    layers: dict[str, dict[str, Any]] = {}
    for name, mask in masks.items():
        links = int(mask.count_nonzero())
        layers[name] = {"shape": list(mask.shape), "links": links, "sparsity": 1 - links / mask.numel()}
        if name in transposed:
            layers[name]["transposed"] = True
    about = {"format": FORMAT, "preset": preset, "step": step, "digest": bits.digest(masks), "layers": layers}
    packed = masks if isinstance(masks, bits.PackedMasks) else bits.PackedMasks.of(masks.items())
    save_file({name: one.cpu() for name, one in packed.packed.items()}, folder / f"{stem}.safetensors")
    (folder / f"{stem}.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def read_topology(folder: Path, stem: str = "topology") -> Topology:
    """Read what ``write_topology`` wrote; ``UserError`` if a file is missing, or the two do not belong together."""
    masks, about = _read_checked(folder, stem)
    transposed = frozenset(name for name, layer in about["layers"].items() if layer.get("transposed", False))
    return Topology(dict(masks.items()), about["preset"], about["step"], transposed)


def has_links(folder: Path) -> bool:
    """Whether a model folder says which links there are; the one of a dense run says that it has no sparse layer."""
    try:
        return bool(json.loads((folder / "topology.json").read_text(encoding="utf-8"))["layers"])
    except OSError:  # there is none, or no folder at all
        return False
    except (ValueError, KeyError, TypeError):  # damaged: whoever reads it says so
        return True


def read_packed(folder: Path, stem: str = "topology") -> tuple[bits.PackedMasks, str, int]:
    """As ``read_topology``, for models too large to have all their masks unpacked: masks, preset and step."""
    masks, about = _read_checked(folder, stem)
    return masks, about["preset"], about["step"]


def _read_checked(folder: Path, stem: str) -> tuple[bits.PackedMasks, dict[str, Any]]:
    about, packed = _read_topology_files(folder, stem)
    layers = about["layers"]
    if layers.keys() != packed.keys():
        odd = sorted(layers.keys() ^ packed.keys())
        raise _mismatch(folder, stem, f"they name different layers, first {odd[0]!r}")
    shapes: dict[str, tuple[int, int]] = {}
    masks = bits.PackedMasks({name: packed[name] for name in layers}, shapes)  # in the order of the model
    for name, layer in layers.items():
        rows, columns = layer["shape"]
        if packed[name].numel() != bits.packed_size(rows * columns):
            raise _mismatch(folder, stem, f"{packed[name].numel()} bytes of {name!r} are no {layer['shape']} mask")
        shapes[name] = (rows, columns)
        if (links := int(masks[name].count_nonzero())) != layer["links"]:
            raise _mismatch(folder, stem, f"{name!r} has {links} links, the JSON file says {layer['links']}")
    if bits.digest(masks) != about["digest"]:
        raise _mismatch(folder, stem, "the digest of the masks is not the one in the JSON file")
    return masks, about


def _read_topology_files(folder: Path, stem: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        about = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        packed = load_file(folder / f"{stem}.safetensors")
    except FileNotFoundError as error:
        raise UserError(
            f"{folder} has no {stem}.json and {stem}.safetensors: it is not a model folder of llm-cht; give the "
            "model/ folder of a run"
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise _mismatch(folder, stem, f"one cannot be read ({error})") from error
    if not _well_formed(about):
        raise _mismatch(folder, stem, "the JSON file lacks a field, or holds another type there")
    if about["format"] != FORMAT:
        raise UserError(
            f"{folder / stem}.json has format {about['format']}, this version reads {FORMAT}: update llm-cht"
        )
    return about, packed


def _well_formed(about: Any) -> bool:
    fields = {"format": int, "preset": str, "step": int, "digest": str, "layers": dict}
    if not isinstance(about, dict) or any(not isinstance(about.get(key), kind) for key, kind in fields.items()):
        return False
    return all(
        isinstance(layer, dict)
        and isinstance(layer.get("links"), int)
        and [type(size) for size in layer.get("shape", ())] == [int, int]
        and isinstance(layer.get("transposed", False), bool)
        for layer in about["layers"].values()
    )


def _mismatch(folder: Path, stem: str, fault: str) -> UserError:
    return UserError(
        f"{folder}: {stem}.json and {stem}.safetensors are damaged or do not belong together: {fault}; "
        "copy both again from where they came, or export the model again"
    )


# ---- model folder ----


def save_model_folder(
    folder: Path,
    model: "PreTrainedModel",
    state: Mapping[str, Tensor],
    tokenizer: "PreTrainedTokenizerBase",
    topology: Topology,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a folder that stock ``transformers`` loads: config, generation config, weights, tokenizer, topology.

    ``state`` holds the whole weights by name: ``model.state_dict()``, or what a checkpoint of many ranks has; of
    ``model`` only class and configs are used, which also say what is ``transposed`` (in ``topology`` it may lack). The
    masks of ``topology`` are empty for a dense model. Converted copies of the weights go into a stock model of the same
    class, which also proves that they fit it. A folder that is already there is replaced if it holds a model of ours.
    Raises ``UserError`` if it holds anything else, or cannot be written.
    """
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not empty and not (folder / "topology.json").exists():
        raise UserError(f"{folder} holds files that llm-cht did not write: give another folder, or empty this one")
    from llm_cht.sparse.linear import transposed_layers  # late: it loads transformers

    dense = _stock_copy(model, state, dtype)
    for name, mask in topology.masks.items():
        weight = dense.get_parameter(f"{name}.weight").detach()
        off = int(weight.masked_fill(mask.to(weight.device), 0).count_nonzero())
        assert off == 0, f"{off} weights of {name} are not 0 off the mask"
    needed = sum(tensor.nbytes for tensor in dense.state_dict().values())
    with disk_errors(folder, needed, "What was in that folder before is untouched."), new_folder(folder) as fresh:
        dense.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        transposed = transposed_layers(dense)
        write_topology(fresh, topology.masks, topology.preset, topology.step, transposed=transposed)


def _stock_copy(model: "PreTrainedModel", state: Mapping[str, Tensor], dtype: torch.dtype) -> "PreTrainedModel":
    """Copy into an unmodified model of the same class: floats converted to ``dtype``, shared where it is the same."""
    with torch.device("meta"):
        dense = type(model)(copy.deepcopy(model.config))
    converted = {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}
    dense.load_state_dict(converted, assign=True)
    dense.tie_weights()  # assign made two parameters of tied ones
    if model.can_generate():  # others, as BERT, have none
        dense.generation_config = copy.deepcopy(model.generation_config)
    return dense


def verify_folder(folder: Path) -> dict[str, LinkCount]:
    """Check that the weights of a model folder are 0 wherever its topology has no link.

    A link may have weight 0 (history, underflow of a short ``dtype``), hence the two counts. Raises ``UserError``
    naming the layer where a weight lacks, has another shape or lies off the mask.
    """
    masks = read_packed(folder)[0]
    counts: dict[str, LinkCount] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
        for name in (name for name in masks if f"{name}.weight" in stored):
            with safe_open(path, framework="pt") as file:  # opened anew: what it has shown stays resident until closed
                counts[name] = _count_links(folder, name, file.get_tensor(f"{name}.weight"), masks[name])
    if missing := sorted(masks.keys() - counts.keys()):
        raise UserError(f"{folder}: no weight for {missing[0]!r}, which topology.json lists; export the model again")
    return counts


def _count_links(folder: Path, name: str, weight: Tensor, mask: Tensor) -> LinkCount:
    if weight.shape != mask.shape:
        raise UserError(
            f"{folder}: the weight of {name!r} is {list(weight.shape)}, its mask {list(mask.shape)}; "
            "the weights and topology.* are of two models: copy the folder again or export the model again"
        )
    nonzero = weight != 0
    if off := int((nonzero & ~mask).count_nonzero()):
        raise UserError(
            f"{folder}: {off} weights of {name!r} are not 0 where topology.safetensors has no link; "
            "the weights were changed after the export: export the model again"
        )
    return LinkCount(links=int(mask.count_nonzero()), nonzero=int((nonzero & mask).count_nonzero()))

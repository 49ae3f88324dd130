"""``llm-cht train`` as a script: ``accelerate launch launch/train.py CONFIG.yaml --section.key value``.

A console script is not a file that ``accelerate launch`` or ``torchrun`` finds on every system, hence these lines; they
add nothing to the command.
"""

import sys

from llm_cht.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))

"""The rules on masks: pure functions of tensors, random keys and numbers.

Nothing here knows a model, an optimizer or a process group, so every rule can be tested by hand and gives the same
answer on any rank and device.
"""

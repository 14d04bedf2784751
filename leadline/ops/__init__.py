"""Operations: one folder each, with the public function and its contract in `__init__.py`, its meaning in
`reference.py` and, for most, a GPU kernel in `kernel.py`. A reference is plain PyTorch, linear in memory, and runs
anywhere; it is the specification, the CPU product and the oracle of the kernel. `dispatch.py` chooses between them.
"""

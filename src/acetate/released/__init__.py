"""What only the released Wan-Alpha code does, for conf/reproduce to choose; nobody else needs to
read it.

`vae` and `dit` are subclasses of tasks and losses. The other modules are functions of tensors.
"""

"""The choices of the released Wan-Alpha code alone, for conf/reproduce; nobody else needs to read
them.

`vae` and `dit` are subclasses of tasks and losses. The other modules are functions of tensors.
"""

"""Regrowth: pretraining that throws nothing away.

The rooms of the house stand at the top of the repository and are imported from here: `regrowth.data_pipeline`, `regrowth.kernels`,
`regrowth.parallel`, `regrowth.pretrain` and `regrowth.launch`. The modules beside this file (`errors`, `files`, `settings`) are the
ground they all stand on and import no room.
"""

__version__ = "0.1.0"

"""File formats of adapters: many spellings and scale rules, one canonical adapter between them.

`plan.plan` says what a file means from its header, `reading.read` gives its tensors, `writing.write` makes another
file. A new dialect is a module here that registers one, and a name in the import below: of dialects whose keys fit
equally well the first is taken.
"""

from . import diffusers_old, xlabs, kohya, comfy, diffusers_file  # noqa: I001

"""The backends: one file for each family. Importing this package registers them all.

Files import torch alone; a kernel library is imported by the first call that needs it.
"""

import gc

if __name__ != "compiled_attn.ops":
    raise ImportError("import compiled_attn.ops: imported as 'ops', it would define every operator twice")

# ruff: noqa: I001  (the order here is the order of list_backends())

# Defining two hundred operators allocates enough to set off a full collection of all that torch has loaded: 0.1 to
# 0.2 s of an import that may take 0.3.
_collecting = gc.isenabled()
gc.disable()

try:
    from . import native as native
    from . import flex as flex
    from . import flash2 as flash2
    from . import flash3 as flash3
    from . import flash4 as flash4
    from . import sage as sage
    from . import hub as hub
    from . import xformers as xformers
    from . import aiter as aiter
    from . import npu as npu
    from . import xla as xla
    from . import triton as triton
    from . import triton_hopper as triton_hopper
    from . import switch as switch
finally:
    if _collecting:
        gc.enable()

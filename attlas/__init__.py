"""Attlas: an atlas of attention that you can run.

layer = attlas.mixer("agent", dim=384, heads=6, grid=(14, 14))    any mechanism as a layer
o = attlas.attend(q, k, v, "softmax", causal=True)                the bare function
names = attlas.mechanisms("*", pattern="causal self")             what there is
report = attlas.swap(model, "agent", where="blocks.*.attn")       into a model that exists
"""

from attlas.adapt.multihead import MultiheadAttention
from attlas.adapt.swap import swap
from attlas.blocks import positions
from attlas.blocks.attention import Attention
from attlas.blocks.factory import attend, make_attend, mixer
from attlas.core.grid import Grid
from attlas.core.mask import Mask
from attlas.core.mechanism import Attend, Mixer, auxiliary_loss
from attlas.core.registry import mechanisms, register
from attlas.core.spec import Spec
from attlas.core.state import state_bytes
from attlas.diagnose import doctor, explain

__version__ = "0.1.0"
__all__ = [
    "Attend",
    "Attention",
    "Grid",
    "Mask",
    "Mixer",
    "MultiheadAttention",
    "Spec",
    "attend",
    "auxiliary_loss",
    "doctor",
    "explain",
    "make_attend",
    "mechanisms",
    "mixer",
    "positions",
    "register",
    "state_bytes",
    "swap",
]

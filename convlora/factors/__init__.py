"""How ΔW is written with few numbers, and formed: one file a factorization, found by name."""

from convlora.factors.base import register_factors
from convlora.factors.convlora import ConvLoRAFactors
from convlora.factors.locon import LoConFactors

register_factors("convlora", ConvLoRAFactors)
register_factors("locon", LoConFactors)

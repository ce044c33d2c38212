"""How ΔW is written with few numbers, and formed: one file a factorization, found by name."""

from convlora.factors.base import Factorization as Factorization
from convlora.factors.base import WeightSpec as WeightSpec
from convlora.factors.base import register_factors as register_factors
from convlora.factors.convlora import ConvLoRAFactors as ConvLoRAFactors
from convlora.factors.locon import LoConFactors as LoConFactors

register_factors("convlora", ConvLoRAFactors)
register_factors("locon", LoConFactors)

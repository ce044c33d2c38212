"""How ΔW is written with few numbers, and formed: one file a factorization, found by name."""

from convlora.factors.base import Factorization as Factorization
from convlora.factors.base import WeightSpec as WeightSpec
from convlora.factors.base import register_factors as register_factors
from convlora.factors.convlora import ConvLoRAFactors as ConvLoRAFactors
from convlora.factors.dense import DenseFactors as DenseFactors
from convlora.factors.dora import DoRAFactors as DoRAFactors
from convlora.factors.locon import LoConFactors as LoConFactors
from convlora.factors.loha import LoHaFactors as LoHaFactors
from convlora.factors.lokr import LoKrFactors as LoKrFactors

register_factors("convlora", ConvLoRAFactors)
register_factors("locon", LoConFactors)
register_factors("dora", DoRAFactors)
register_factors("dora_in", DoRAFactors(per_input=True))
register_factors("loha", LoHaFactors)
register_factors("lokr", LoKrFactors)
register_factors("dense", DenseFactors)

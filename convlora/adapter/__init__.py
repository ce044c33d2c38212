"""An adapter as a value, without a model: its data, its file, its algebra, and `Adapter` with the verbs on top."""

from convlora.adapter.adapter import Adapter as Adapter
from convlora.adapter.parts import LayerFactors as LayerFactors

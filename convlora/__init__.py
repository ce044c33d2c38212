"""Adapt any convolutional PyTorch network with a file of some kilobytes.

Example:
    >>> import torch, convlora
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 3, 3))
    >>> _ = convlora.inject(model, targets=["0", "2"], rank=2)
    >>> optimizer = torch.optim.AdamW(convlora.parameters(model), lr=1e-3)
    >>> _ = convlora.remove(convlora.merge(model))
"""

from convlora import card as card
from convlora import distill as distill
from convlora import formats as formats
from convlora import hub as hub
from convlora.adapter.adapter import Adapter as Adapter
from convlora.config import AdapterConfig as AdapterConfig
from convlora.errors import ConvLoRAError as ConvLoRAError
from convlora.errors import ConvLoRAWarning as ConvLoRAWarning
from convlora.factors.base import register_factors as register_factors
from convlora.inspect.allocate import allocate_ranks as allocate_ranks
from convlora.inspect.report import audit as audit
from convlora.inspect.report import summary as summary
from convlora.model.groups import parameter_groups as parameter_groups
from convlora.model.inject import inject as inject
from convlora.model.inject import remove as remove
from convlora.model.outside import changed as changed
from convlora.model.outside import freeze as freeze
from convlora.model.storage import adapter as adapter
from convlora.model.storage import load as load
from convlora.model.storage import merged_state_dict as merged_state_dict
from convlora.model.storage import save as save
from convlora.model.switch import activate as activate
from convlora.model.switch import disabled as disabled
from convlora.model.switch import merge as merge
from convlora.model.switch import merged as merged
from convlora.model.switch import per_sample as per_sample
from convlora.model.switch import unmerge as unmerge
from convlora.model.switch import using as using
from convlora.model.traversal import adapters as adapters
from convlora.model.traversal import parameters as parameters

__version__ = "0.1.0"

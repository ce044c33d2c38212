"""Feature distillation: `Distiller`, and losses between features."""

from convlora.distill.distiller import Distilled as Distilled
from convlora.distill.distiller import Distiller as Distiller
from convlora.distill.losses import attention as attention
from convlora.distill.losses import channel_affinity as channel_affinity
from convlora.distill.losses import instance_affinity as instance_affinity
from convlora.distill.losses import l1 as l1
from convlora.distill.losses import mse as mse
from convlora.distill.losses import register_loss as register_loss
from convlora.distill.losses import spatial_affinity as spatial_affinity

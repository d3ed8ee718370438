"""[Delta, …] -> Delta: several adapters of one base as one, and how much they overlap."""

from .activations import collect_grams as collect_grams
from .contract import Fusion as Fusion
from .contract import Part as Part
from .fuse import Fused as Fused
from .fuse import fuse as fuse
from .overlap import LayerOverlap as LayerOverlap
from .overlap import OverlapReport as OverlapReport
from .overlap import PairOverlap as PairOverlap
from .schedule import Schedule as Schedule
from .schedule import chance_of_no_clash as chance_of_no_clash
from .schedule import disjoint_schedule as disjoint_schedule
from .schedule import sampled_schedule as sampled_schedule
from .table import FUSIONS as FUSIONS

"""Methods x learning rates x seeds x tasks, compared."""

from .cluster import Cluster as Cluster
from .config import SweepConfig as SweepConfig
from .config import load_sweep as load_sweep
from .config import parse_sweep as parse_sweep
from .engines import connect as connect
from .method_comparison import as_method_comparison as as_method_comparison
from .method_comparison import write_method_comparison as write_method_comparison
from .record import SweepRecord as SweepRecord
from .run_sweep import run_sweep as run_sweep
from .seeds import seeds_like as seeds_like
from .store import sweep_folder as sweep_folder
from .summary import shown as shown
from .summary import spread as spread
from .summary import summarise as summarise
from .summary import to_markdown as to_markdown
from .sweep_folder import SweepFolder as SweepFolder

"""Files <-> tensors: nothing is read before it is asked for, nothing half-written stands under its name."""

from .adapter_folder import AdapterFolder as AdapterFolder
from .adapter_folder import read_adapter_folder as read_adapter_folder
from .fingerprint import fingerprint as fingerprint
from .reader import Checkpoint as Checkpoint
from .reader import open_checkpoint as open_checkpoint
from .tensor_file import TensorFile as TensorFile
from .writer import fresh_folder as fresh_folder
from .writer import save_tensors as save_tensors
from .writer import write_atomically as write_atomically

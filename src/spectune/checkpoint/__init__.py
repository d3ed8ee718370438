"""Files <-> tensors: nothing is read before it is asked for, nothing half-written stands under its name."""

from .adapter_folder import CONFIG_FILE as CONFIG_FILE
from .adapter_folder import CONFIG_LIMIT as CONFIG_LIMIT
from .adapter_folder import PEFT_PREFIX as PEFT_PREFIX
from .adapter_folder import TENSOR_FILE as TENSOR_FILE
from .adapter_folder import AdapterFolder as AdapterFolder
from .adapter_folder import adapter_path as adapter_path
from .adapter_folder import read_adapter_folder as read_adapter_folder
from .base import Base as Base
from .base import base_at_hand as base_at_hand
from .base import find_base as find_base
from .claim import hold_folder as hold_folder
from .fingerprint import fingerprint as fingerprint
from .lora_file import LoraFile as LoraFile
from .lora_file import read_lora as read_lora
from .reader import Checkpoint as Checkpoint
from .reader import open_checkpoint as open_checkpoint
from .run_folder import trained_in as trained_in
from .sources import refuse_to_replace as refuse_to_replace
from .targets import Target as Target
from .targets import find_targets as find_targets
from .tensor_file import TensorFile as TensorFile
from .writer import disk_error as disk_error
from .writer import fresh_folder as fresh_folder
from .writer import save_tensors as save_tensors
from .writer import sync_tree as sync_tree
from .writer import write_atomically as write_atomically

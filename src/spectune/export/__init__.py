"""Delta -> files that other libraries load: exact where the algebra allows, and checked before the folder appears."""

from .gguf import GgufExport as GgufExport
from .gguf import export_gguf as export_gguf
from .lora import LoraExport as LoraExport
from .lora import export_lora as export_lora
from .merged import Merged as Merged
from .merged import merge_checkpoint as merge_checkpoint
from .ollama import OllamaExport as OllamaExport
from .ollama import export_ollama as export_ollama
from .verify import Proof as Proof
from .verify import verify_lora as verify_lora

"""Adapters extracted from full fine-tunes, and LoRAs resized to another rank."""

from .calibrate import calibrated as calibrated
from .extract import extract_adapter as extract_adapter
from .extracted import Extracted as Extracted
from .resize import Resized as Resized
from .resize import resize_lora as resize_lora

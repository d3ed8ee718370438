"""A run on one page: the record of what was done, its spectra, its charts, and the HTML that shows them."""

from .adapter_source import is_adapter as is_adapter
from .adapter_survey import AdapterSurvey as AdapterSurvey
from .adapter_survey import adapter_group_figures as adapter_group_figures
from .adapter_survey import survey_adapter as survey_adapter
from .budget import BudgetRow as BudgetRow
from .budget import budget as budget
from .model_survey import ModelSurvey as ModelSurvey
from .model_survey import group_figures as group_figures
from .model_survey import survey_model as survey_model
from .overlap_page import write_overlap_page as write_overlap_page
from .page import readable_bytes as readable_bytes
from .page import write_report as write_report
from .rate_page import write_rate_page as write_rate_page
from .run_record import Example as Example
from .run_record import LayerSpectrum as LayerSpectrum
from .run_record import Metric as Metric
from .run_record import Proof as Proof
from .run_record import RunRecord as RunRecord
from .run_record import Size as Size
from .run_record import machine as machine
from .run_record import versions as versions
from .spectra import layer_spectra as layer_spectra
from .survey_page import readable_seconds as readable_seconds
from .survey_page import share as share
from .survey_page import short as short
from .survey_page import write_survey as write_survey

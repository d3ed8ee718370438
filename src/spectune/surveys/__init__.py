"""The spectra of a model or an adapter, before and after tuning."""

from .adapter_source import is_adapter as is_adapter
from .adapter_survey import AdapterSurvey as AdapterSurvey
from .adapter_survey import adapter_group_figures as adapter_group_figures
from .adapter_survey import survey_adapter as survey_adapter
from .budget import BudgetRow as BudgetRow
from .budget import budget as budget
from .model_survey import ModelSurvey as ModelSurvey
from .model_survey import group_figures as group_figures
from .model_survey import survey_model as survey_model

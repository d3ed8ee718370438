"""HTML pages that load nothing and run nothing, and the charts on them."""

from .claims_page import write_claims as write_claims
from .comparison_page import write_comparison as write_comparison
from .overlap_page import write_overlap_page as write_overlap_page
from .rate_page import write_rate_page as write_rate_page
from .run_page import readable_bytes as readable_bytes
from .run_page import write_report as write_report
from .survey_page import readable_seconds as readable_seconds
from .survey_page import share as share
from .survey_page import short as short
from .survey_page import write_survey as write_survey

"""The report of an evaluation, and of single classifications: one HTML file, readable offline."""

from vm_core.report.page import render_evaluation as render_evaluation
from vm_core.report.page import render_explanations as render_explanations

"""`vppo eval`: a model's accuracy on benchmarks, from local copies of them. See docs/evaluation.md.

question.py has the record that every benchmark becomes, suite.py its settings, sources/ one reader per format,
grading.py and statistics.py what becomes of the responses.
"""

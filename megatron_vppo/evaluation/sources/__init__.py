"""The readers of benchmarks, one module per format: a row in, a question out. suite.py has the table of them."""

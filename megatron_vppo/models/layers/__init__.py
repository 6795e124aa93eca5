"""The layers that both towers are made of, in plain torch or from TransformerEngine, over packed sequences."""

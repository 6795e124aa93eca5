"""The language model: decoder, rotary positions of three coordinates, deepstack inputs, its part of the weight map."""

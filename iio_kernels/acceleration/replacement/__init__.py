"""Puts `slot_attention` where a graph spells it out, once it has proved in float64 that both are the same."""

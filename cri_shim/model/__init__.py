"""Identifiers, errors, records and the protocols between the layers. Pure values, no effects."""

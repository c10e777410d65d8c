"""Training of the parametric model on permissively licensed text, behind a gate that reads licences first.

This package never imports ``datastore``: what holds restricted text is out of reach of what makes weights.
"""

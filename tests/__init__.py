"""Tests of kvloom; `families` and `modes` hold the models and the ways of running them."""

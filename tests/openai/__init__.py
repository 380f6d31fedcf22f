"""Tests of Chat Completions with a fake API and its faults."""

"""Tests of Claude with a fake Messages API and its faults."""

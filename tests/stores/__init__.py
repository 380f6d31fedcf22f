"""Tests of the contract of all stores, and of each store."""

"""Helpers of the tests and the benchmarks: clients, models, proxies and a fake Messages API."""

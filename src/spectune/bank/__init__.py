"""Thousands of small adapters on one basis, resident in one model; every row of a batch has its own."""

from .bank import AdapterBank as AdapterBank

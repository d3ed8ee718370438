"""Thousands of small adapters in one basis, resident in one model; each row of a batch can use a different one."""

from .bank import AdapterBank as AdapterBank

"""Deletion requests: schema, intake, ledger."""

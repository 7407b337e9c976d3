"""What the ledger says: rollups, exports, reconciliation with vendors' invoices, what tenants see of their usage."""

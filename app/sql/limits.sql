-- name: spent
-- Each tenant's and each key's tokens and dollars since a day began, and dollars since a month began, of calls before a moment.
SELECT
    CASE WHEN grouping(tenant_id) = 0 THEN 'tenant' ELSE 'key' END,
    CASE WHEN grouping(tenant_id) = 0 THEN tenant_id ELSE key_id END,
    coalesce(sum(total_tokens) FILTER (WHERE occurred_at >= to_timestamp(%(day)s)), 0)::bigint,
    coalesce(sum(cost_usd) FILTER (WHERE occurred_at >= to_timestamp(%(day)s)), 0),
    coalesce(sum(cost_usd), 0)
FROM ledger
WHERE occurred_at >= to_timestamp(%(month)s)
  AND occurred_at < to_timestamp(%(before)s)
  AND environment = %(environment)s
  AND purpose = 'client'
  AND tenant_id IS NOT NULL
GROUP BY GROUPING SETS ((tenant_id), (key_id));

-- name: results
-- Clients' calls by UTC day and alias, and how the cache answered them (null: it did not), with what that saved.
SELECT
    (occurred_at AT TIME ZONE 'UTC')::date AS day,
    model_alias,
    event ->> 'cache_kind' AS kind,
    count(*),
    sum(saved_usd),
    sum(cost_usd)
FROM ledger
WHERE occurred_at >= %(first)s::date::timestamp AT TIME ZONE 'UTC'
  AND occurred_at < (%(last)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
  AND (%(tenant)s::text IS NULL OR tenant_id = %(tenant)s::text)
  AND purpose = 'client' AND adjusts IS NULL AND status = 'success' AND model_alias IS NOT NULL
GROUP BY day, model_alias, kind
ORDER BY day, model_alias, kind;

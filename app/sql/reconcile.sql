-- name: by_group
-- What vendors were asked for, by UTC day, vendor model and provider: calls, tokens, dollars.
SELECT (occurred_at AT TIME ZONE 'UTC')::date, model_resolved, provider, NULL::text,
       count(*) FILTER (WHERE adjusts IS NULL), sum(input_tokens)::bigint, sum(output_tokens)::bigint, sum(cost_input_usd), sum(cost_output_usd)
FROM ledger
WHERE occurred_at >= %(first)s::date::timestamp AT TIME ZONE 'UTC'
  AND occurred_at < (%(last)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
  AND provider = ANY(%(providers)s) AND NOT cache_hit AND (usage_source <> 'none' OR adjusts IS NOT NULL)
GROUP BY 1, 2, 3;

-- name: by_call
-- The same, call by call with the vendor's request id, one page after a row; adjustments follow their calls.
SELECT (occurred_at AT TIME ZONE 'UTC')::date, model_resolved, provider,
       -- An adjustment has its call's time, and belongs to what the vendor knows the call by.
       CASE WHEN adjusts IS NULL THEN vendor_request_id ELSE (
           SELECT call.vendor_request_id FROM ledger AS call
           WHERE call.occurred_at = ledger.occurred_at AND call.event_id = ledger.adjusts
       ) END,
       (adjusts IS NULL)::int::bigint, input_tokens, output_tokens, cost_input_usd, cost_output_usd, occurred_at, event_id
FROM ledger
WHERE occurred_at >= greatest(%(first)s::date::timestamp AT TIME ZONE 'UTC', %(after_at)s::timestamptz)
  AND occurred_at < (%(last)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
  AND (occurred_at, event_id) > (%(after_at)s::timestamptz, %(after_id)s::uuid)
  AND provider = ANY(%(providers)s) AND NOT cache_hit AND (usage_source <> 'none' OR adjusts IS NOT NULL)
ORDER BY occurred_at, event_id
LIMIT %(rows)s;

-- name: beside
-- What calls had to pay for beside their answers (doubtful answers, whoever was outrun) is in their rows' sums: taken off
-- there, and put where the vendor has it.
WITH paid AS (
    SELECT (occurred_at AT TIME ZONE 'UTC')::date AS day, model_resolved, ledger.provider, ledger.vendor_request_id,
           attempt ->> 'model' AS model, attempt ->> 'provider' AS at_provider, attempt ->> 'vendor_request_id' AS at_request_id,
           (attempt #>> '{usage,input_tokens}')::bigint AS input_tokens, (attempt #>> '{usage,output_tokens}')::bigint AS output_tokens,
           (attempt #>> '{cost_usd,input}')::numeric AS input_usd, (attempt #>> '{cost_usd,output}')::numeric AS output_usd
    FROM ledger CROSS JOIN LATERAL jsonb_array_elements(event -> 'attempts') AS attempt
    WHERE occurred_at >= %(first)s::date::timestamp AT TIME ZONE 'UTC'
      AND occurred_at < (%(last)s::date::timestamp + interval '1 day') AT TIME ZONE 'UTC'
      AND adjusts IS NULL AND jsonb_typeof(attempt -> 'usage') = 'object'
)
SELECT day, model_resolved, provider, vendor_request_id, 0::bigint, -input_tokens, -output_tokens, -input_usd, -output_usd
FROM paid WHERE provider = ANY(%(providers)s)
UNION ALL
SELECT day, model, at_provider, at_request_id, 1, input_tokens, output_tokens, input_usd, output_usd
FROM paid WHERE at_provider = ANY(%(providers)s);

-- name: create_reconciliation
-- What reconciliations found, for the alert and for the record.
CREATE TABLE IF NOT EXISTS reconciliation (
    made_at  timestamptz NOT NULL DEFAULT now(),
    vendor   text        NOT NULL,
    first    date        NOT NULL,
    last     date        NOT NULL,
    ratio    float8      NOT NULL,
    found    jsonb       NOT NULL
);

-- name: keep
-- Keeps a report.
INSERT INTO reconciliation (vendor, first, last, ratio, found)
VALUES (%(vendor)s, %(first)s, %(last)s, %(ratio)s, %(found)s::jsonb);

-- name: latest
-- The last report's drift of each vendor, and when it was made.
SELECT DISTINCT ON (vendor) vendor, ratio, extract(epoch FROM made_at)::float8
FROM reconciliation
ORDER BY vendor, made_at DESC;

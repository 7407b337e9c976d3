-- name: create_job
-- When each job ran last and how it ended; what standing-by processes and the alert look at.
CREATE TABLE IF NOT EXISTS job (
    name         text        PRIMARY KEY,
    started_at   timestamptz,
    succeeded_at timestamptz,
    failed_at    timestamptz,
    error        text
);

-- name: try_lock
-- Whether this process runs the jobs until the transaction ends; one at a time does.
SELECT pg_try_advisory_xact_lock(hashtextextended('gateway jobs', 0));

-- name: ages
-- Seconds since each job began, succeeded and failed; null for never.
SELECT
    name,
    extract(epoch FROM clock_timestamp() - started_at)::float8,
    extract(epoch FROM clock_timestamp() - succeeded_at)::float8,
    extract(epoch FROM clock_timestamp() - failed_at)::float8,
    error
FROM job;

-- name: started
-- Notes that a job began.
INSERT INTO job (name, started_at) VALUES (%(name)s, clock_timestamp())
ON CONFLICT (name) DO UPDATE SET started_at = excluded.started_at;

-- name: succeeded
-- Notes that a job did what it is for.
UPDATE job SET succeeded_at = clock_timestamp(), error = NULL WHERE name = %(name)s;

-- name: failed
-- Notes why a job did not.
UPDATE job SET failed_at = clock_timestamp(), error = %(error)s WHERE name = %(name)s;

"""Every way a call can fail, as types. Retry, status and ledger outcome follow the type, never a message.

GatewayError
├── RequestError                    the caller can mend it
│   ├── InvalidRequest              400 invalid_request
│   ├── UnsupportedParameter        400 unsupported_parameter
│   ├── RequestTooLarge             413 request_too_large
│   ├── NotFound                    404 not_found
│   ├── MethodNotAllowed            405 method_not_allowed
│   ├── InvalidApiKey               401 invalid_api_key
│   ├── AdminForbidden              403 admin_forbidden
│   ├── RoleRequired                403 role_required
│   ├── TenantRequired              401 tenant_required
│   ├── TenantNotAllowed            403 tenant_not_allowed
│   ├── GuardrailBlocked            400 guardrail_blocked
│   ├── ModelNotFound               404 model_not_found
│   ├── ModelNotAllowed             403 model_not_allowed
│   ├── IdempotencyMismatch         422 idempotency_mismatch
│   ├── IdempotencyInProgress       409 idempotency_in_progress
│   └── IdempotencyDone             409 idempotency_already_done
├── LimitError                      a limit of ours tripped; `limit` names it
│   ├── RateLimitExceeded           429 rate_limit_exceeded
│   └── BudgetExceeded              429 budget_exceeded
├── OwnFault                        this replica cannot serve just now
│   ├── LedgerUnavailable           503 ledger_unavailable
│   ├── UsageUnavailable            503 ledger_unavailable
│   ├── LimitsUnavailable           503 gateway_overloaded
│   ├── CacheUnavailable            503 gateway_overloaded
│   ├── IssuerUnavailable           503 gateway_overloaded
│   ├── Overloaded                  503 gateway_overloaded
│   ├── ReadOnly                    503 gateway_read_only
│   ├── GuardrailUnavailable        503 guardrail_unavailable
│   ├── Draining                    503 gateway_overloaded
│   └── InternalError               500 internal_error
├── VendorError                     what one attempt met; `retry` says what comes next
│   ├── VendorRefused               as sent by the vendor: the request itself is at fault, to the client at once
│   ├── VendorCannot                the vendor has no equivalent for a parameter: the next target
│   ├── VendorKeyFull               our share of what the vendor grants a key is used up: the next key or target
│   ├── VendorThrottled             429: again on this target after its Retry-After, or the next one
│   ├── VendorFailed                5xx, 408, 409, 529: again here, or the next one
│   ├── VendorUnreachable           no connection: again here, or the next one
│   ├── VendorBroke                 cut, empty or undecodable answer: again here, or the next one
│   ├── VendorTimeout               silent for too long: the next target
│   └── VendorMisconfigured         401, 402, 403, 404: this target cools down, the next one
└── UpstreamError                   the whole chain failed
    ├── UpstreamUnavailable         503 upstream_unavailable
    ├── UpstreamMisconfigured       502 upstream_misconfigured
    └── DeadlineExceeded            504 deadline_exceeded
"""

from __future__ import annotations

from typing import ClassVar, Literal

Retry = Literal["here", "next", "never"]
"""What follows a failed attempt: `here` the same target again while attempts last, `next` the next target, `never`."""


class GatewayError(Exception):
    """Root of the tree. `message` is a sentence for the caller that says what to do; it never holds a secret."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    type: ClassVar[str] = "api_error"
    outcome: ClassVar[str] = "error"
    """The ledger's `status` for a call that ends with this error."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        limit: str | None = None,
        retry_after_seconds: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.limit = limit
        self.retry_after_seconds = retry_after_seconds
        self.should_retry = should_retry


class RequestError(GatewayError):
    """The request is at fault: change it, do not repeat it."""

    code = "invalid_request"
    status = 400
    type = "invalid_request_error"
    outcome = "refused"


class InvalidRequest(RequestError):
    """The body or a header cannot be read. The message names the place."""


class UnsupportedParameter(RequestError):
    """No target of the alias can carry a parameter: leave it out, or name it in the target's `drop_params`."""

    code = "unsupported_parameter"


class RequestTooLarge(RequestError):
    """The body is above `gateway.max_body_bytes`. Send less, or raise the limit in the configuration."""

    code = "request_too_large"
    status = 413


class NotFound(RequestError):
    """No such route. The README lists the routes."""

    code = "not_found"
    status = 404


class MethodNotAllowed(RequestError):
    """The route exists, the method does not."""

    code = "method_not_allowed"
    status = 405


class InvalidApiKey(RequestError):
    """No credential, or one that is unknown or expired. Make one with `gateway keys new`."""

    code = "invalid_api_key"
    status = 401
    type = "authentication_error"


class AdminForbidden(RequestError):
    """The admin port wants its own token: GATEWAY_ADMIN_TOKEN."""

    code = "admin_forbidden"
    status = 403
    type = "permission_error"


class RoleRequired(RequestError):
    """The key is valid and not for this: its entry in service_keys.yaml needs the role that the message names."""

    code = "role_required"
    status = 403
    type = "permission_error"


class TenantRequired(RequestError):
    """The credential says who calls; X-Tenant-Id must say on whose behalf."""

    code = "tenant_required"
    status = 401
    type = "authentication_error"


class TenantNotAllowed(RequestError):
    """The credential may not act for that tenant: `service_keys.<id>.tenants`."""

    code = "tenant_not_allowed"
    status = 403
    type = "permission_error"


class GuardrailBlocked(RequestError):
    """A guardrail says no to the prompt, or to the answer: `guardrails` of the alias and of the tenant."""

    code = "guardrail_blocked"
    outcome = "blocked"


class ModelNotFound(RequestError):
    """No alias of that name: `GET /v1/models` lists those that the tenant may use."""

    code = "model_not_found"
    status = 404


class ModelNotAllowed(RequestError):
    """The tenant's `allowed_models` does not hold this alias."""

    code = "model_not_allowed"
    status = 403
    type = "permission_error"


class IdempotencyMismatch(RequestError):
    """The Idempotency-Key came with another request before: a new request needs a new key."""

    code = "idempotency_mismatch"
    status = 422


class IdempotencyInProgress(RequestError):
    """The first call with this Idempotency-Key still ran when this one's deadline passed: send it again later."""

    code = "idempotency_in_progress"
    status = 409


class IdempotencyDone(RequestError):
    """The first call with this Idempotency-Key is done and its answer was not kept: a new key asks again."""

    code = "idempotency_already_done"
    status = 409


class LimitError(GatewayError):
    """A limit of ours tripped. `limit` names it; `retry_after_seconds` is computed from it.

    `rates` is a `core.Rates`: how the limits stood, for the answer's headers.
    """

    rates: object = None
    status = 429
    type = "rate_limit_error"
    outcome = "rate_limited"


class RateLimitExceeded(LimitError):
    """A rate is used up: wait `retry_after_seconds`."""

    code = "rate_limit_exceeded"


class BudgetExceeded(LimitError):
    """A budget is used up until its window ends: retrying sooner cannot help."""

    code = "budget_exceeded"


class OwnFault(GatewayError):
    """This replica cannot serve the call; another replica, or a later try, may."""

    status = 503


class LedgerUnavailable(OwnFault):
    """The spool cannot take a row, so no new call is accepted: free disk space, see `gateway_spool_*`."""

    code = "ledger_unavailable"


class UsageUnavailable(OwnFault):
    """PostgreSQL, which has the ledger, is away or not configured: calls go on, their usage can be read later."""

    code = "ledger_unavailable"


class LimitsUnavailable(OwnFault):
    """Redis is away, and `gateway.redis.away` says `closed` for one of the call's limits."""

    code = "gateway_overloaded"


class CacheUnavailable(OwnFault):
    """Redis is away, so nothing was invalidated: send it again. Until Redis is back nothing from before is found."""

    code = "gateway_overloaded"


class IssuerUnavailable(OwnFault):
    """The keys of a token's issuer were never read: see `issuers.<name>.jwks` and the log."""

    code = "gateway_overloaded"


class Overloaded(OwnFault):
    """More than the replica can do well: calls above `gateway.overload`, or bodies above `gateway.max_bodies_bytes`.

    More replicas, or a higher limit, or a higher `priority` for the tenant.
    """

    code = "gateway_overloaded"


class ReadOnly(OwnFault):
    """An incident mode is on: `gateway mode` tells which and until when, `gateway mode normal` ends it."""

    code = "gateway_read_only"
    outcome = "refused"


class GuardrailUnavailable(OwnFault):
    """A guardrail gave no answer in time, and `guardrails.<name>.away` says `closed`: see to it, or say `open`."""

    code = "guardrail_unavailable"


class Draining(OwnFault):
    """This replica stops, and its drain limit ended the answer: send the call again."""

    code = "gateway_overloaded"
    outcome = "interrupted"


class InternalError(OwnFault):
    """A defect of the gateway. The log has the traceback under the request id."""

    status = 500


class VendorError(GatewayError):
    """What one attempt met. Never shown as it is: the chain goes on, or an `UpstreamError` sums it up.

    `vendor_status` is the HTTP status, None when no answer came; `vendor_code` the vendor's own error code.
    """

    retry: ClassVar[Retry] = "here"
    fault: ClassVar[str] = "error"
    """Class of the failure in metrics and in the ledger's `attempts`."""

    def __init__(
        self,
        message: str,
        *,
        vendor_status: int | None = None,
        vendor_code: str | None = None,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message, param=param, retry_after_seconds=retry_after_seconds)
        self.vendor_status = vendor_status
        self.vendor_code = vendor_code


class VendorRefused(VendorError):
    """The vendor says that the request is at fault: it goes to the client with the vendor's own words.

    `kind` is the vendor's error type (OpenAI's `type`).
    """

    retry = "never"
    fault = "refused"
    outcome = "refused"

    def __init__(self, message: str, *, kind: str | None = None, **fields: object) -> None:
        super().__init__(message, **fields)  # type: ignore[arg-type]
        self.kind = kind


class VendorCannot(VendorError):
    """The vendor has no equivalent for the parameter `param`: nothing was sent. Another target may have one."""

    retry = "next"
    fault = "unsupported"


class VendorKeyFull(VendorError):
    """The `rpm` or `tpm` of a vendor's key is used up: nothing was sent. Another key, or target, may have room."""

    retry = "next"
    fault = "key_full"


class VendorThrottled(VendorError):
    """429 from the vendor: honour its Retry-After, or go to the next target."""

    fault = "throttled"


class VendorFailed(VendorError):
    """The vendor answered, and says that it failed."""

    fault = "failed"


class VendorUnreachable(VendorError):
    """No connection, or it broke before an answer began."""

    fault = "unreachable"


class VendorBroke(VendorError):
    """The answer was cut, empty, or cannot be decoded."""

    fault = "broke"


class VendorTimeout(VendorError):
    """No first token, or no next chunk, within the limit. Waiting as long again here would spend the deadline."""

    retry = "next"
    fault = "timeout"


class VendorMisconfigured(VendorError):
    """401, 402, 403 or 404: our credential, account or model id is wrong there. Mend `providers`, `targets`, or pay."""

    retry = "next"
    fault = "misconfigured"


class UpstreamError(GatewayError):
    """Every target of the chain failed. Our own retries are spent, so the client should not add its own."""


class UpstreamUnavailable(UpstreamError):
    """No target could answer: see `gateway_vendor_errors_total` and the row's `attempts`."""

    code = "upstream_unavailable"
    status = 503


class UpstreamMisconfigured(UpstreamError):
    """Every target refused our credential or model id: mend the configuration."""

    code = "upstream_misconfigured"
    status = 502


class DeadlineExceeded(UpstreamError):
    """The call's one deadline passed: `timeouts.total_seconds`."""

    code = "deadline_exceeded"
    status = 504
    outcome = "timeout"

//! Requests and tokens a minute, per API key: 429 with `Retry-After` beyond them, and OpenAI's `x-ratelimit-*` headers on every answer.
//!
//! Both are token buckets that hold a minute's worth. How many tokens an answer has is known when it has ended: a bucket is charged for what was
//! used, may go below zero by that, and lets nobody in until it is above again.

use crate::app::App;
use crate::auth::KeyDigest;
use crate::openai::errors::ApiError;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

const MINUTE: f64 = 60.0;

tokio::task_local! {
    /// Whom the running request is charged to.
    static ACCOUNT: Arc<Account>;
}

/// What fills up again.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    /// Of a minute.
    capacity: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn full(capacity: u32, now: Instant) -> Self {
        Self { capacity: f64::from(capacity), level: f64::from(capacity), at: now }
    }

    fn fill(&mut self, now: Instant) {
        let filled = now.saturating_duration_since(self.at).as_secs_f64() * self.capacity / MINUTE;
        (self.level, self.at) = ((self.level + filled).min(self.capacity), now.max(self.at));
    }

    /// How long it takes to reach a level.
    fn until(&self, level: f64) -> Duration {
        Duration::from_secs_f64((level - self.level).max(0.0) * MINUTE / self.capacity)
    }

    /// Whole units that are left.
    fn remaining(&self) -> u64 {
        self.level.max(0.0) as u64
    }
}

#[derive(Debug, Clone, Copy)]
struct Buckets {
    requests: Option<Bucket>,
    tokens: Option<Bucket>,
}

/// What one key has left.
#[derive(Debug)]
pub struct Account {
    buckets: Mutex<Buckets>,
}

impl Account {
    fn new(requests: Option<u32>, tokens: Option<u32>, now: Instant) -> Self {
        let full = |capacity: Option<u32>| capacity.map(|capacity| Bucket::full(capacity, now));
        Self { buckets: Mutex::new(Buckets { requests: full(requests), tokens: full(tokens) }) }
    }

    /// The account of the request that runs in this task, if rates are limited.
    pub fn current() -> Option<Arc<Self>> {
        ACCOUNT.try_with(Arc::clone).ok()
    }

    fn filled(&self, now: Instant) -> MutexGuard<'_, Buckets> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets { requests, tokens } = &mut *buckets;
        requests.iter_mut().chain(tokens).for_each(|bucket| bucket.fill(now));
        buckets
    }

    /// Takes a request in, or says why not, and when there is room for one.
    fn admit(&self, now: Instant) -> Result<(), (String, Duration)> {
        let mut buckets = self.filled(now);
        for (bucket, what) in [(&buckets.requests, "requests"), (&buckets.tokens, "tokens")] {
            if let Some(bucket) = bucket.as_ref().filter(|b| b.level < 1.0) {
                let message = format!("rate limit reached: {} {what} a minute", bucket.capacity);
                return Err((message, bucket.until(1.0)));
            }
        }
        if let Some(requests) = &mut buckets.requests {
            requests.level -= 1.0;
        }
        Ok(())
    }

    /// So many tokens of a prompt or of an answer were used.
    pub fn charge(&self, used: usize) {
        if let Some(tokens) = &mut self.filled(Instant::now()).tokens {
            tokens.level -= used as f64;
        }
    }

    /// Writes OpenAI's headers.
    fn describe(&self, headers: &mut HeaderMap, now: Instant) {
        const REQUESTS: [&str; 3] = ["x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"];
        const TOKENS: [&str; 3] = ["x-ratelimit-limit-tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"];
        let Buckets { requests, tokens } = *self.filled(now);
        for (bucket, names) in [(requests, REQUESTS), (tokens, TOKENS)] {
            let Some(bucket) = bucket else { continue };
            let values = [bucket.capacity.to_string(), bucket.remaining().to_string(), period(bucket.until(bucket.capacity))];
            for (name, value) in names.into_iter().zip(values) {
                if let Ok(value) = HeaderValue::from_str(&value) {
                    headers.insert(HeaderName::from_static(name), value);
                }
            }
        }
    }
}

/// As OpenAI writes it: `250ms`, `1.5s`, `6m0s`.
fn period(duration: Duration) -> String {
    let milliseconds = duration.as_millis();
    match milliseconds {
        0..1_000 => format!("{milliseconds}ms"),
        1_000..60_000 => format!("{}s", milliseconds as f64 / 1e3),
        _ => format!("{}m{}s", milliseconds / 60_000, milliseconds % 60_000 / 1_000),
    }
}

/// All accounts. There are as many as keys: a request with an unknown one doesn't come this far.
#[derive(Debug)]
pub struct RateLimits {
    requests: Option<u32>,
    tokens: Option<u32>,
    accounts: Mutex<HashMap<KeyDigest, Arc<Account>>>,
}

impl RateLimits {
    /// So many requests and tokens a minute; `None` = as many as come.
    pub fn new(requests: Option<u32>, tokens: Option<u32>) -> Self {
        Self { requests, tokens, accounts: Mutex::default() }
    }

    fn is_off(&self) -> bool {
        self.requests.is_none() && self.tokens.is_none()
    }

    fn account(&self, owner: KeyDigest, now: Instant) -> Arc<Account> {
        let mut accounts = self.accounts.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(accounts.entry(owner).or_insert_with(|| Arc::new(Account::new(self.requests, self.tokens, now))))
    }
}

/// Around every route that needs a key, after the key was checked.
pub async fn limit_rate(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    if app.rate_limits.is_off() || request.method() != Method::POST {
        return next.run(request).await;
    }
    let now = Instant::now();
    let account = app.rate_limits.account(app.api_keys.owner(request.headers()), now);
    let mut response = match account.admit(now) {
        Ok(()) => ACCOUNT.scope(Arc::clone(&account), next.run(request)).await,
        Err((message, wait)) => {
            app.metrics.rejected("rate_limit");
            // whole seconds are sent, and too early is in vain
            ApiError::rate_limited(message, Duration::from_secs(wait.as_secs() + 1)).into_response()
        }
    };
    account.describe(response.headers_mut(), Instant::now());
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_minutes_requests_may_come_at_once_and_then_one_at_a_time() {
        let now = Instant::now();
        let account = Account::new(Some(6), None, now);
        assert!((0..6).all(|_| account.admit(now).is_ok()));
        let (message, wait) = account.admit(now).unwrap_err();
        assert_eq!((message.as_str(), wait), ("rate limit reached: 6 requests a minute", Duration::from_secs(10)));
        let later = now + Duration::from_secs(11);
        assert!(account.admit(later).is_ok() && account.admit(later).is_err());
        assert!((0..6).all(|_| account.admit(now + Duration::from_secs(600)).is_ok()), "never more than a minute's worth");
        assert!(account.admit(now + Duration::from_secs(600)).is_err());
    }

    #[test]
    fn tokens_are_charged_when_they_are_used_and_a_debt_has_to_be_waited_out() {
        let now = Instant::now();
        let account = Account::new(None, Some(600), now);
        assert!(account.admit(now).is_ok());
        account.charge(500);
        assert!(account.admit(now).is_ok());
        account.charge(700);
        let wait = account.admit(Instant::now()).unwrap_err().1.as_secs_f64();
        assert!((50.0..61.0).contains(&wait), "600 below zero at 10 a second: {wait}");
        assert!(account.admit(now + Duration::from_secs(62)).is_ok());
    }

    #[test]
    fn headers_say_what_is_left_and_when_it_is_full_again() {
        let now = Instant::now();
        let account = Account::new(Some(60), Some(1_200), now);
        account.admit(now).unwrap();
        let mut headers = HeaderMap::new();
        account.describe(&mut headers, now);
        let value = |name: &str| headers[name].to_str().unwrap();
        assert_eq!([value("x-ratelimit-limit-requests"), value("x-ratelimit-remaining-requests"), value("x-ratelimit-reset-requests")], ["60", "59", "1s"]);
        assert_eq!([value("x-ratelimit-limit-tokens"), value("x-ratelimit-remaining-tokens"), value("x-ratelimit-reset-tokens")], ["1200", "1200", "0ms"]);
        assert_eq!([250, 1_500, 360_000].map(|ms| period(Duration::from_millis(ms))), ["250ms", "1.5s", "6m0s"]);
    }

    #[test]
    fn every_key_has_its_own_account() {
        let (limits, now) = (RateLimits::new(Some(1), None), Instant::now());
        assert!(limits.account([1; 32], now).admit(now).is_ok());
        assert!(limits.account([1; 32], now).admit(now).is_err());
        assert!(limits.account([2; 32], now).admit(now).is_ok());
    }
}

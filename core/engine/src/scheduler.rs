//! Requests side by side: who is worked on, in which pass, and what becomes of the answers.

use std::{
    collections::BTreeMap,
    fmt,
    ops::ControlFlow,
    sync::Arc,
    time::{Duration, Instant},
};

use polyattn_api::{
    Accepted, CommittedRows, Draft, DraftSequence, LengthWish, Match, Outcome, Phase, PrefixReuse, Proposal,
    ProposeContext, ProposerError, Role, Sampling, SequenceObserved, StepObserved, TargetRows, TreeWish, Verification,
    contained,
};
use polyattn_device::{Buffer, Commands, Readback};
use polyattn_nn::ops;

use crate::{
    Backends, Engine, EngineError, PageKind,
    engine::{Drafting, HAND_OVER},
    meter,
    report::{AcceptanceCounts, Generation, StopReason},
    runner::{Head, Ids, Pass, PassSequence},
};

/// What to generate.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Ids of the prompt.
    pub prompt: Vec<u32>,
    /// New tokens at the most.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Ids that end the text; the model's own where `None`.
    pub stop: Option<Vec<u32>>,
    /// Whether the engine's drafter drafts for it, if there is one.
    pub speculative: bool,
}

impl Request {
    /// A greedy request that stops where the model does.
    #[must_use]
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self { prompt, max_tokens, sampling: Sampling::default(), stop: None, speculative: true }
    }
}

/// A request that was added to an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(u64);

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Where the time of steps went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// Steps.
    pub steps: u64,
    /// All of them together.
    pub total: Duration,
    /// In the target and the drafter: recording their work, and waiting for it.
    pub models: Duration,
}

impl StepTimes {
    /// The share that was the models', from 0 to 1.
    #[must_use]
    pub fn efficiency(&self) -> f64 {
        if self.total.is_zero() { 1.0 } else { self.models.as_secs_f64() / self.total.as_secs_f64() }
    }
}

/// Something that happened to a request.
#[derive(Debug)]
pub struct Event {
    /// The request.
    pub request: RequestId,
    /// What happened.
    pub what: Happened,
}

/// What can happen to a request.
#[derive(Debug)]
#[non_exhaustive]
pub enum Happened {
    /// New tokens; none where a chunk of its prompt was run.
    Tokens(Vec<u32>),
    /// It ended, and this came of it.
    Finished(Box<Generation>),
    /// It ended with an error.
    Failed(EngineError),
}

/// A request under way.
#[derive(Debug)]
pub(crate) struct Running {
    id: u64,
    request: Request,
    stop: Vec<u32>,
    callback: Option<Callback>,
    /// The prompt and what was generated.
    tokens: Vec<u32>,
    pages: Vec<i32>,
    /// Tokens whose keys and values the target has.
    computed: usize,
    /// Whether only the anchor is still to be computed.
    prefilled: bool,
    /// Whether the drafter drafts for it.
    drafts: bool,
    /// Tokens that the drafter was told of, in their pages too; 0 where those hold nothing of a drafter's.
    committed: usize,
    counts: Option<AcceptanceCounts>,
    steps: u64,
    started: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    drafter_lost: bool,
    cached_tokens: usize,
    preemptions: u64,
    backends: Backends,
    calls: BTreeMap<&'static str, u64>,
}

type TokenCallback = dyn FnMut(&[u32]) -> ControlFlow<()> + Send;

struct Callback(Box<TokenCallback>);

impl fmt::Debug for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Callback")
    }
}

impl Running {
    fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Whether ids are all that must be known of the target's answer.
    fn takes_best(&self) -> bool {
        self.request.sampling.is_greedy() && !self.request.sampling.looks_back()
    }

    /// Tokens that may be drafted, within the request and the context.
    fn room(&self, context: usize) -> u32 {
        let left = self.request.max_tokens - self.generated();
        let most = left.min(context - (self.tokens.len() - 1) - 1).saturating_sub(1);
        u32::try_from(most).unwrap_or(u32::MAX)
    }

    /// Appends tokens up to the first that ends the request, and hands them to the caller. Answers how many.
    fn emit(&mut self, tokens: &[u32], context: usize) -> (usize, Option<StopReason>) {
        let before = self.tokens.len();
        let mut stop = None;
        for token in tokens {
            self.tokens.push(*token);
            stop = if self.stop.contains(token) {
                Some(StopReason::EndOfSequence)
            } else if self.generated() >= self.request.max_tokens {
                Some(StopReason::Length)
            } else if self.tokens.len() >= context {
                Some(StopReason::Context)
            } else {
                None
            };
            if stop.is_some() {
                break;
            }
        }
        meter::tokens(self.tokens.len() - before);
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        if let Some(Callback(call)) = &mut self.callback
            && call(&self.tokens[before..]).is_break()
        {
            stop = stop.or(Some(StopReason::Cancelled));
        }
        (self.tokens.len() - before, stop)
    }

    fn generation(&mut self, stop: StopReason, lossless: bool) -> Generation {
        let first = self.first_token.unwrap_or(self.started);
        Generation {
            tokens: self.tokens[self.request.prompt.len()..].to_vec(),
            prompt_tokens: self.request.prompt.len(),
            stop,
            steps: self.steps,
            prefill: first - self.started,
            decode: self.last_token.map_or(Duration::ZERO, |last| last - first),
            acceptance: self.counts.as_ref().map(AcceptanceCounts::report),
            lossless: lossless || !self.request.speculative,
            drafter_lost: self.drafter_lost,
            cached_tokens: self.cached_tokens,
            preemptions: self.preemptions,
            backends: std::mem::take(&mut self.backends),
            calls: std::mem::take(&mut self.calls),
        }
    }

    fn lose_drafter(&mut self) {
        if self.drafts {
            self.drafts = false;
            self.drafter_lost = true;
            meter::drafter_lost();
        }
    }
}

/// What a sequence puts into a pass.
struct Part {
    /// The request.
    id: u64,
    first_row: u32,
    rows: u32,
    draft: Draft,
    /// Where its draft lies on the device, and how many tokens it has, until they are read.
    on_device: Option<(u32, u32)>,
}

/// The answers of a pass on their way to the host.
struct Answers {
    best: Option<Readback>,
    /// For each part that needs more than ids.
    logits: Vec<Option<Readback>>,
}

impl Engine {
    /// Adds a request. It is worked on in [`step`](Self::step).
    ///
    /// # Errors
    /// A request that does not fit the model, the cache or the acceptance rule.
    pub fn add_request(&mut self, request: Request) -> Result<RequestId, EngineError> {
        self.add(request, None)
    }

    /// Adds a request whose new tokens are also told to `callback` as they come, and none of them between the chunks of
    /// its prompt; it may end the request.
    ///
    /// # Errors
    /// As [`add_request`](Self::add_request).
    pub fn add_streaming_request(
        &mut self,
        request: Request,
        callback: impl FnMut(&[u32]) -> ControlFlow<()> + Send + 'static,
    ) -> Result<RequestId, EngineError> {
        self.add(request, Some(Callback(Box::new(callback))))
    }

    fn add(&mut self, request: Request, callback: Option<Callback>) -> Result<RequestId, EngineError> {
        self.check(&request)?;
        let id = self.next_request;
        self.next_request += 1;
        let drafts = self.drafting.is_some() && request.speculative;
        self.waiting.push_back(Running {
            id,
            stop: request.stop.clone().unwrap_or_else(|| self.model.eos.clone()),
            callback,
            tokens: request.prompt.clone(),
            pages: Vec::new(),
            computed: 0,
            prefilled: false,
            drafts,
            committed: 0,
            counts: self.drafting.is_some().then(AcceptanceCounts::default),
            steps: 0,
            started: Instant::now(),
            first_token: None,
            last_token: None,
            drafter_lost: false,
            cached_tokens: 0,
            preemptions: 0,
            backends: Backends::default(),
            calls: BTreeMap::new(),
            request,
        });
        meter::request_added();
        Ok(RequestId(id))
    }

    /// Ends a request: its tokens so far are in the [`Happened::Finished`] of the next step. `false` where it is unknown
    /// or has ended already.
    pub fn cancel(&mut self, request: RequestId) -> bool {
        if let Some(at) = self.place(request.0) {
            self.finish(at, StopReason::Cancelled);
            return true;
        }
        let Some(at) = self.waiting.iter().position(|one| one.id == request.0) else { return false };
        if let Some(waiting) = self.waiting.remove(at) {
            self.end(waiting, StopReason::Cancelled);
        }
        true
    }

    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty() && self.events.is_empty()
    }

    /// Requests that are worked on, and those that wait.
    #[must_use]
    pub fn load_of_requests(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// One pass of the target for all requests that can take part in it: chunks of prompts, or the next tokens with
    /// their drafts. Answers what happened to each; an error ends the requests of the pass it happened in.
    pub fn step(&mut self) -> Vec<Event> {
        let begun = Instant::now();
        self.admit();
        let mut concerned = Vec::new();
        if !self.running.is_empty() {
            if let Err(error) = self.advance(&mut concerned) {
                self.fail(&concerned, error);
            }
            let (backends, calls) = self.kernels.take_counts();
            self.attribute(&concerned, &backends, &calls);
        }
        meter::load(self.running.len(), self.waiting.len(), self.pages.free());
        self.times.steps += 1;
        self.times.total += begun.elapsed();
        std::mem::take(&mut self.events)
    }

    /// Where the time of the steps since the last call went.
    pub fn take_times(&mut self) -> StepTimes {
        std::mem::take(&mut self.times)
    }

    /// Generates from a prompt. `on_tokens` is given each step's new tokens, none between the chunks of the prompt, and
    /// may end the request. Other requests that were added go on meanwhile.
    ///
    /// # Errors
    /// A request that does not fit the model; a device that failed. Its pages are free again in any case.
    pub fn generate(
        &mut self,
        request: &Request,
        on_tokens: &mut dyn FnMut(&[u32]) -> ControlFlow<()>,
    ) -> Result<Generation, EngineError> {
        let id = self.add_request(request.clone())?;
        let mut of_others = Vec::new();
        let mut given_up = false;
        loop {
            let mut outcome = None;
            for event in self.step() {
                match event.what {
                    _ if event.request != id => of_others.push(event),
                    Happened::Tokens(tokens) => given_up |= on_tokens(&tokens).is_break(),
                    Happened::Finished(generation) => outcome = Some(Ok(*generation)),
                    Happened::Failed(error) => outcome = Some(Err(error)),
                }
            }
            if let Some(outcome) = outcome {
                self.events.append(&mut of_others);
                return outcome;
            }
            if given_up {
                self.cancel(id);
            }
        }
    }

    fn check(&self, request: &Request) -> Result<(), EngineError> {
        let fail = |message: String| Err(EngineError::Request(message));
        let tokens = request.prompt.len();
        if tokens == 0 {
            return fail("the prompt has no tokens".into());
        }
        if request.max_tokens == 0 {
            return fail("0 new tokens asked for, at least 1".into());
        }
        if tokens >= self.context as usize {
            let context = self.context;
            return fail(format!("the prompt has {tokens} tokens and leaves no room in a context of {context}"));
        }
        let (needed, total) = (tokens.div_ceil(self.page_size()), self.pages.total());
        if needed > total {
            return fail(format!("the prompt has {tokens} tokens, which need {needed} pages, the cache has {total}"));
        }
        self.check_ids(&request.prompt)?;
        if let Some(fault) = request.sampling.fault() {
            return fail(fault);
        }
        let refused = self.drafting.as_ref().and_then(|drafting| {
            contained(|| drafting.rule.refuses(&request.sampling)).unwrap_or_else(|message| {
                Some(drafting.rule_fault(format!("it panicked in refuses: {message}")).to_string())
            })
        });
        match refused {
            Some(fault) if request.speculative => fail(fault),
            _ => Ok(()),
        }
    }

    fn page_size(&self) -> usize {
        self.runner.sizes().page_size as usize
    }

    fn place(&self, id: u64) -> Option<usize> {
        self.running.iter().position(|one| one.id == id)
    }

    /// Takes up waiting requests as long as there is room.
    fn admit(&mut self) {
        while self.running.len() < self.max_sequences
            && let Some(next) = self.waiting.front()
        {
            let needed = (next.tokens.len() + 1).div_ceil(self.page_size());
            if !self.running.is_empty() && needed > self.pages.free() {
                break;
            }
            let Some(mut next) = self.waiting.pop_front() else { break };
            self.begin(&mut next);
            self.running.push(next);
        }
        // One that was pre-empted is older than others.
        self.running.sort_by_key(|one| one.id);
    }

    /// Begins with pages that are known to hold the text's beginning.
    fn begin(&mut self, next: &mut Running) {
        if !self.prefix_cache {
            return;
        }
        let page_size = self.page_size();
        // At least one token is run, for its logits.
        let most = (next.tokens.len() - 1) / page_size;
        let reuse = self.drafting.as_ref().filter(|_| next.drafts).map(Drafting::reuse);
        let (mut pages, kind) = match reuse {
            Some(PrefixReuse::None) => return,
            Some(_) => (self.pages.begin(PageKind::Drafted, &next.tokens, page_size as u32, most), PageKind::Drafted),
            None => {
                let mut plain = self.pages.begin(PageKind::Plain, &next.tokens, page_size as u32, most);
                let mut drafted = self.pages.begin(PageKind::Drafted, &next.tokens, page_size as u32, most);
                let (longer, shorter, kind) = match plain.len() >= drafted.len() {
                    true => (&mut plain, &mut drafted, PageKind::Plain),
                    false => (&mut drafted, &mut plain, PageKind::Drafted),
                };
                self.pages.release(shorter);
                (std::mem::take(longer), kind)
            }
        };
        if reuse == Some(PrefixReuse::AllButTheLastPage) {
            let mut last: Vec<i32> = pages.pop().into_iter().collect();
            self.pages.release(&mut last);
        }
        next.computed = pages.len() * page_size;
        // Plain pages stay plain: the drafter knows nothing of them.
        next.committed = if kind == PageKind::Drafted { next.computed } else { 0 };
        // Of its own pages, found again after others needed them, nothing was saved.
        if next.preemptions == 0 {
            next.cached_tokens = next.computed.min(next.request.prompt.len());
        }
        next.pages = pages;
        meter::cached(next.computed);
    }

    /// Makes the pages of a text known.
    fn know(&mut self, one: &Running) {
        if !self.prefix_cache {
            return;
        }
        let (kind, tokens) = match one.committed {
            0 => (PageKind::Plain, one.computed),
            told => (PageKind::Drafted, one.computed.min(told)),
        };
        self.pages.know(kind, &one.tokens[..tokens], &one.pages, self.runner.sizes().page_size);
    }

    /// Pages for so many tokens of a request. Where there are none left the youngest request gives its own and waits
    /// again; `false` where that is this one.
    fn reserve(&mut self, id: u64, tokens: usize) -> bool {
        let pages = tokens.div_ceil(self.page_size());
        while let Some(at) = self.place(id) {
            if self.pages.grow(&mut self.running[at].pages, pages).is_ok() {
                return true;
            }
            let youngest = self.running.len() - 1;
            if youngest > 0 {
                self.preempt(youngest);
            } else {
                self.finish(at, StopReason::OutOfPages);
            }
        }
        false
    }

    /// Takes a request's pages away; nothing of its text is lost.
    fn preempt(&mut self, at: usize) {
        let mut one = self.running.remove(at);
        tracing::info!("request {} waits: its pages are needed by an older one", one.id);
        meter::preempted();
        self.know(&one);
        self.pages.release(&mut one.pages);
        if let Some(drafting) = &mut self.drafting {
            drafting.drafter.forget(one.id);
        }
        (one.computed, one.committed, one.prefilled) = (0, 0, false);
        one.preemptions += 1;
        self.waiting.push_front(one);
    }

    fn finish(&mut self, at: usize, stop: StopReason) {
        let one = self.running.remove(at);
        self.end(one, stop);
    }

    fn end(&mut self, mut one: Running, stop: StopReason) {
        self.know(&one);
        self.free(&mut one);
        let lossless = self.is_lossless();
        let generation = one.generation(stop, lossless);
        meter::finished(&generation);
        let what = Happened::Finished(Box::new(generation));
        self.events.push(Event { request: RequestId(one.id), what });
    }

    /// Takes back what a request holds. What it has under way on the device ends before anything else begins there.
    fn free(&mut self, one: &mut Running) {
        self.ahead.clear();
        self.pages.release(&mut one.pages);
        if let Some(drafting) = &mut self.drafting {
            drafting.drafter.forget(one.id);
            if let Err(message) = contained(|| drafting.policy.forget(one.id)) {
                tracing::warn!("{}", drafting.policy_fault(format!("it panicked in forget: {message}")));
            }
        }
    }

    /// Ends requests with an error. Others go on; what was recorded for them is lost with the pass, so they go on
    /// without drafts.
    fn fail(&mut self, ids: &[u64], error: EngineError) {
        self.recorded = None;
        let mut failed: Vec<Running> = Vec::new();
        for id in ids {
            if let Some(at) = self.place(*id) {
                failed.push(self.running.remove(at));
            }
        }
        for one in &mut self.running {
            one.lose_drafter();
            one.committed = 0;
        }
        let several = failed.len() > 1;
        let mut error = Some(error);
        let mut shared: Option<Arc<EngineError>> = None;
        for mut one in failed {
            self.free(&mut one);
            let error = match error.take() {
                Some(error) if !several => error,
                Some(error) => EngineError::Shared(Arc::clone(shared.insert(Arc::new(error)))),
                None => match &shared {
                    Some(shared) => EngineError::Shared(Arc::clone(shared)),
                    None => continue,
                },
            };
            self.events.push(Event { request: RequestId(one.id), what: Happened::Failed(error) });
        }
    }

    /// Ends one request of a pass with an error of its own.
    fn fail_one(&mut self, id: u64, error: EngineError) {
        if let Some(at) = self.place(id) {
            let mut one = self.running.remove(at);
            self.free(&mut one);
            self.events.push(Event { request: RequestId(id), what: Happened::Failed(error) });
        }
    }

    /// Who ran in a pass, for the reports of its requests; those that ended in it are told by their events.
    fn attribute(&mut self, ids: &[u64], backends: &Backends, calls: &BTreeMap<&'static str, u64>) {
        for id in ids {
            let place = self.place(*id);
            let ended = self.events.iter_mut().find_map(|event| match &mut event.what {
                Happened::Finished(generation) if event.request.0 == *id => Some(generation),
                _ => None,
            });
            let (held, counted) = match (ended, place) {
                (Some(generation), _) => (&mut generation.backends, &mut generation.calls),
                (None, Some(at)) => {
                    let one = &mut self.running[at];
                    (&mut one.backends, &mut one.calls)
                }
                (None, None) => continue,
            };
            held.add(backends);
            for (backend, count) in calls {
                *counted.entry(backend).or_default() += count;
            }
        }
    }

    fn advance(&mut self, concerned: &mut Vec<u64>) -> Result<(), EngineError> {
        if !self.ahead.is_empty() || self.can_run_ahead() {
            return self.run_ahead(concerned);
        }
        let prefilling = self.running.iter().any(|one| !one.prefilled);
        let decoding = self.running.iter().any(|one| one.prefilled);
        // Prompts and decoding take turns, so that neither waits for the other's end.
        let after_prompts = self.prefilled_last;
        self.prefilled_last = prefilling && !(decoding && after_prompts);
        if self.prefilled_last { self.prefill(concerned) } else { self.decode(concerned, after_prompts) }
    }

    /// The recording that the next pass goes into; it may hold what the last one committed.
    fn recording(&mut self) -> Result<Commands, EngineError> {
        match self.recorded.take() {
            Some(commands) => Ok(commands),
            None => Ok(self.device.commands()?.handed_over_every(HAND_OVER)),
        }
    }

    fn begin_step(&self) {
        if let Some(recorder) = &self.recorder {
            recorder.begin_step();
        }
    }

    fn submit(&self, commands: Commands) -> Result<(), EngineError> {
        let _ = commands.submit()?;
        match &self.recorder {
            Some(recorder) => recorder.write(),
            None => Ok(()),
        }
    }

    /// Runs chunks of prompts, the oldest request's first.
    fn prefill(&mut self, concerned: &mut Vec<u64>) -> Result<(), EngineError> {
        let mut budget = self.chunk as usize;
        let mut ends = self.runner.sizes().head_rows;
        let mut parts: Vec<(u64, usize)> = Vec::new();
        let wanting: Vec<u64> = self.running.iter().filter(|one| !one.prefilled).map(|one| one.id).collect();
        for id in wanting {
            let Some(at) = self.place(id) else { continue };
            let one = &self.running[at];
            let (computed, left) = (one.computed, one.tokens.len() - one.computed);
            let rows = left.min(budget);
            if rows == 0 || ends == 0 {
                break;
            }
            if self.reserve(id, computed + rows) {
                ends -= u32::from(rows == left);
                budget -= rows;
                parts.push((id, rows));
            }
        }
        concerned.extend(parts.iter().map(|(id, _)| *id));
        if parts.is_empty() {
            return Ok(());
        }

        let mut commands = self.recording()?;
        self.begin_step();
        let (mut ids, mut sequences, mut last_rows, mut whole) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (id, rows) in &parts {
            let Some(at) = self.place(*id) else { continue };
            let one = &self.running[at];
            let end = one.computed + rows;
            ids.extend_from_slice(&one.tokens[one.computed..end]);
            let (position, rows) = (one.computed as u32, *rows as u32);
            sequences.push(PassSequence { position, rows, pages: &one.pages, tree: None });
            if end == one.tokens.len() {
                last_rows.push(ids.len() as u32 - 1);
                whole.push(at);
            }
        }
        let head = if last_rows.is_empty() { Head::None } else { Head::Rows(&last_rows) };
        let pass = Pass { phase: Phase::Prefill, ids: Ids::Host(&ids), sequences: &sequences, head };
        let begun = Instant::now();
        self.runner.pass(&mut commands, &self.kernels, &pass)?;
        let answered: Vec<(usize, u32)> = whole.iter().map(|at| (*at, 1)).collect();
        let answers = self.ask(&mut commands, &answered)?;
        self.submit(commands)?;
        let answers = answers.wait()?;
        self.times.models += begun.elapsed();

        let mut row = 0;
        let mut commits: Vec<(u64, Vec<u32>, u32)> = Vec::new();
        let mut place = 0;
        for (id, rows) in parts {
            let Some(at) = self.place(id) else { continue };
            let first_row = row;
            row += rows as u32;
            let one = &mut self.running[at];
            let position = one.computed as u32;
            one.computed += rows;
            if one.computed < one.tokens.len() {
                if one.drafts {
                    commits.push((id, (first_row..row).collect(), position));
                }
                let given_up = one.callback.as_mut().is_some_and(|Callback(call)| call(&[]).is_break());
                self.events.push(Event { request: RequestId(id), what: Happened::Tokens(Vec::new()) });
                if given_up {
                    self.finish(at, StopReason::Cancelled);
                }
                continue;
            }
            let answer = answers.of(place, place as u32, 1, self.model.vocab_size as usize);
            place += 1;
            one.prefilled = true;
            let nothing = Draft::default();
            let verification = Verification::new(&nothing, &one.tokens, &one.request.sampling, answer);
            let (bonus, judged) =
                (polyattn_api::AcceptanceRule::accept(&Match, &verification).bonus, one.tokens.len() - 1);
            if let Err(error) = self.check_finite(&answer, 0, judged) {
                self.fail_one(id, error);
                continue;
            }
            let one = &mut self.running[at];
            let (_, stop) = one.emit(&[bonus], self.context as usize);
            let told = one.tokens[one.tokens.len() - 1..].to_vec();
            let drafts = one.drafts;
            self.events.push(Event { request: RequestId(id), what: Happened::Tokens(told) });
            match stop {
                Some(stop) => self.finish(at, stop),
                None if drafts => commits.push((id, (first_row..row).collect(), position)),
                None => {}
            }
        }
        self.commit(&commits)?;
        self.know_prompts(concerned);
        Ok(())
    }

    /// Makes the pages of prompts known that were just run, for requests that begin like them.
    fn know_prompts(&mut self, ids: &[u64]) {
        if !self.prefix_cache {
            return;
        }
        for id in ids {
            if let Some(at) = self.place(*id).filter(|at| self.running[*at].prefilled) {
                let one = self.running.remove(at);
                self.know(&one);
                self.running.insert(at, one);
            }
        }
    }

    /// Greedy decoding of one request without drafts can take its id on the device.
    fn can_run_ahead(&self) -> bool {
        match &self.running[..] {
            [one] => {
                self.waiting.is_empty() && self.recorder.is_none() && one.prefilled && one.takes_best() && !one.drafts
            }
            _ => false,
        }
    }

    /// One token of one request. The next pass takes its id on the device, so it is under way before the host has seen
    /// it.
    fn run_ahead(&mut self, concerned: &mut Vec<u64>) -> Result<(), EngineError> {
        // The oldest: a request that came later waits until what is under way is seen.
        let Some(one) = self.running.first() else { return Ok(()) };
        let id = one.id;
        concerned.push(id);
        if let Some(commands) = self.recorded.take() {
            let _ = commands.submit()?;
        }
        // On the CPU a pass is over when it is recorded: running ahead would only compute what is thrown away.
        let most = if self.device.is_cpu() { 1 } else { 2 };
        while self.ahead.len() < most && self.can_run_ahead() {
            let submitted = self.ahead.len();
            let one = &self.running[0];
            let position = one.tokens.len() - 1 + submitted;
            let wanted = one.generated() + submitted < one.request.max_tokens && position + 1 < self.context as usize;
            if !wanted {
                break;
            }
            let pages = (position + 1).div_ceil(self.page_size());
            if self.pages.grow(&mut self.running[0].pages, pages).is_err() {
                if submitted == 0 {
                    self.finish(0, StopReason::OutOfPages);
                    return Ok(());
                }
                break;
            }
            let one = &self.running[0];
            let begun = Instant::now();
            let mut commands = self.device.commands()?;
            let ids = [one.tokens[one.tokens.len() - 1]];
            let ids = match submitted {
                0 => Ids::Host(&ids),
                _ => Ids::Device(self.runner.best_ids().whole()),
            };
            let sequences = [PassSequence { position: position as u32, rows: 1, pages: &one.pages, tree: None }];
            let pass = Pass { phase: Phase::Decode, ids, sequences: &sequences, head: Head::All };
            self.runner.pass(&mut commands, &self.kernels, &pass)?;
            let best = self.runner.best(&mut commands, 1)?;
            self.ahead.push_back(commands.read_back(best)?);
            let _ = commands.submit()?;
            self.times.models += begun.elapsed();
        }
        let Some(next) = self.ahead.pop_front() else { return Ok(()) };
        let waiting = Instant::now();
        let id_of_token = next.wait_as::<u32>()?;
        self.times.models += waiting.elapsed();
        let one = &self.running[0];
        self.check_finite(&TargetRows::Best(&id_of_token), 0, one.tokens.len() - 1)?;
        let one = &mut self.running[0];
        one.steps += 1;
        one.computed += 1;
        let (_, stop) = one.emit(&id_of_token[..1], self.context as usize);
        self.events.push(Event { request: RequestId(id), what: Happened::Tokens(id_of_token[..1].to_vec()) });
        if let Some(stop) = stop {
            self.finish(0, stop);
        }
        Ok(())
    }

    /// The next tokens of every request that is past its prompt: draft, verify, emit. Behind prompts the device may
    /// still be at what the drafter makes of them.
    fn decode(&mut self, concerned: &mut Vec<u64>, after_prompts: bool) -> Result<(), EngineError> {
        let begun = Instant::now();
        // As many as the pass has rows for, and the rows that each may take.
        let rows = self.runner.sizes().head_rows.min(self.runner.sizes().rows) as usize;
        let decoding: Vec<u64> = self.running.iter().filter(|one| one.prefilled).map(|one| one.id).take(rows).collect();
        let share = (rows / decoding.len().max(1)) as u32;
        let widths: BTreeMap<u64, u32> =
            decoding.iter().map(|id| (*id, self.width(*id, decoding.len(), share))).collect();
        // The anchors' own places first: for those, younger requests give way.
        let decoding: Vec<u64> = decoding
            .into_iter()
            .filter(|id| {
                let at = self.place(*id);
                at.is_some_and(|at| self.reserve(*id, self.running[at].tokens.len()))
            })
            .collect();
        concerned.extend(&decoding);
        if decoding.is_empty() {
            return Ok(());
        }
        self.begin_step();
        let mut commands = self.recording()?;
        let asked: Vec<(u64, u32)> = decoding
            .iter()
            .map(|id| (*id, widths.get(id).copied().unwrap_or(0)))
            .filter(|(id, width)| *width > 0 && self.reserve_draft(*id, *width))
            .collect();
        let (proposal, returned) = self.propose(&asked, share, commands)?;
        commands = returned;
        let drafted_in = begun.elapsed();

        let (parts, on_device) = self.lay_out(&decoding, &asked, proposal);
        let total: u32 = parts.iter().map(|part| part.rows).sum();
        let over_tree = parts.iter().any(|part| !part.draft.is_chain());
        let mut ids: Vec<u32> = Vec::with_capacity(total as usize);
        for part in &parts {
            let Some(at) = self.place(part.id) else { continue };
            let tokens = &self.running[at].tokens;
            let anchor = tokens[tokens.len() - 1];
            match (part.on_device, &on_device) {
                (Some((first, _)), Some(_)) => ids.extend(first..first + part.rows),
                (_, Some(_)) => ids.push(ops::given_id(anchor)),
                _ => {
                    ids.push(anchor);
                    ids.extend(&part.draft.tokens);
                }
            }
            if part.on_device.is_none() && on_device.is_some() {
                ids.extend(part.draft.tokens.iter().map(|id| ops::given_id(*id)));
            }
        }
        let sequences: Vec<PassSequence<'_>> = parts
            .iter()
            .filter_map(|part| {
                let one = &self.running[self.place(part.id)?];
                let position = one.tokens.len() as u32 - 1;
                let tree = over_tree.then_some(&part.draft);
                Some(PassSequence { position, rows: part.rows, pages: &one.pages, tree })
            })
            .collect();
        let as_they_lie = parts.len() == 1 && parts[0].on_device.is_some_and(|(first, _)| first == 0);
        let ids = match &on_device {
            None => Ids::Host(&ids),
            Some(buffer) if as_they_lie => Ids::Device(buffer.slice(0, u64::from(total) * 4)?),
            Some(buffer) => Ids::Gathered { ids: buffer.whole(), sources: &ids },
        };
        let phase = if total as usize > parts.len() { Phase::Verify } else { Phase::Decode };
        let asking = Instant::now();
        self.runner.pass(&mut commands, &self.kernels, &Pass { phase, ids, sequences: &sequences, head: Head::All })?;
        let answered: Vec<(usize, u32)> =
            parts.iter().filter_map(|part| Some((self.place(part.id)?, part.rows))).collect();
        let answers = self.ask(&mut commands, &answered)?;
        let read = match &on_device {
            None => None,
            Some(buffer) if as_they_lie => Some(commands.read_back(buffer.slice(0, u64::from(total) * 4)?)?),
            Some(_) => Some(commands.read_back(self.runner.ids().slice(0, u64::from(total) * 4)?)?),
        };
        self.submit(commands)?;
        let read = read.map(Readback::wait_as::<u32>).transpose()?;
        let answers = answers.wait()?;
        self.times.models += asking.elapsed();
        let observed = self.judge(parts, read.as_deref(), &answers, begun, drafted_in)?;
        if let Some(drafting) = &mut self.drafting {
            let time = (!after_prompts).then(|| begun.elapsed());
            let learnt = contained(|| drafting.policy.observe(&StepObserved::new(&observed, time)));
            if let Err(message) = learnt {
                let error = drafting.policy_fault(format!("it panicked in observe: {message}"));
                self.lose_drafter(&decoding, &error);
            }
        }
        Ok(())
    }

    /// The tokens to draft for a request, within the rows that it may take.
    fn width(&mut self, id: u64, batch: usize, share: u32) -> u32 {
        let context = self.context as usize;
        let Some(at) = self.place(id) else { return 0 };
        let one = &self.running[at];
        let Some(drafting) = self.drafting.as_mut().filter(|_| one.drafts) else { return 0 };
        // A tree has no more levels than nodes.
        let most = drafting.drafter.max_tokens().min(one.room(context)).min(share.saturating_sub(1));
        if most == 0 {
            return 0;
        }
        let wish = LengthWish::new(id, batch as u32, drafting.width, most);
        match contained(|| drafting.policy.width(&wish)) {
            Ok(width) => width.min(most),
            Err(message) => {
                let error = drafting.policy_fault(format!("it panicked in width: {message}"));
                self.lose_drafter(&[id], &error);
                0
            }
        }
    }

    /// Pages for a draft: where there are none, the request goes without.
    fn reserve_draft(&mut self, id: u64, width: u32) -> bool {
        let (page_size, Some(at), Some(drafting)) = (self.page_size(), self.place(id), &self.drafting) else {
            return false;
        };
        let nodes = drafting.tree.as_ref().map_or(width, |(_, nodes)| *nodes);
        let block = self.running[at].tokens.len() + drafting.drafter.max_tokens().max(nodes) as usize;
        self.pages.grow(&mut self.running[at].pages, block.div_ceil(page_size)).is_ok()
    }

    /// Asks the drafter. One that fails is left out of the rest of these requests.
    fn propose(
        &mut self,
        asked: &[(u64, u32)],
        share: u32,
        mut commands: Commands,
    ) -> Result<(Option<Proposal>, Commands), EngineError> {
        let Some(drafting) = self.drafting.as_mut().filter(|_| !asked.is_empty()) else { return Ok((None, commands)) };
        let drawn = drafting.rule.wants_drawn_tokens();
        let sequences: Vec<DraftSequence<'_>> = asked
            .iter()
            .filter_map(|(id, width)| {
                let one = self.running.iter().find(|one| one.id == *id)?;
                let sampling = &one.request.sampling;
                let sampling = (drawn && !sampling.is_greedy()).then_some(sampling);
                Some(DraftSequence::new(*id, &one.tokens, *width, &one.pages).drawn(sampling))
            })
            .collect();
        let tree = drafting.tree.as_ref().map(|(builder, nodes)| TreeWish {
            builder: builder.as_ref(),
            nodes: (*nodes).min(share - 1),
            candidates: drafting.candidates,
        });
        let mut faults: Vec<(u64, ProposerError)> = Vec::new();
        let mut context = ProposeContext::new(&mut commands, &sequences, &self.runner).with_tree(tree);
        let begun = Instant::now();
        let proposal = drafting.drafter.propose(&mut context);
        self.times.models += begun.elapsed();
        let proposal = match proposal {
            Ok(Proposal::Marginals(all)) => {
                let drafts = all.iter().zip(&sequences).map(|(marginals, sequence)| {
                    let built = tree.map_or(Ok(Draft::default()), |tree| tree.build(marginals, sequence.width));
                    built.unwrap_or_else(|error| {
                        faults.push((sequence.id, error));
                        Draft::default()
                    })
                });
                Ok(Proposal::Host(drafts.collect()))
            }
            other => other,
        };
        for (id, error) in &faults {
            self.lose_drafter(&[*id], error);
        }
        match proposal {
            Ok(proposal) => Ok((Some(proposal), commands)),
            Err(error) => {
                let ids: Vec<u64> = asked.iter().map(|(id, _)| *id).collect();
                self.lose_drafter(&ids, &error);
                // What it recorded may be no good.
                Ok((None, self.device.commands()?.handed_over_every(HAND_OVER)))
            }
        }
    }

    fn lose_drafter(&mut self, ids: &[u64], error: &ProposerError) {
        for id in ids {
            tracing::warn!("the drafter failed and is left out of request {id}: {error}");
            if let Some(at) = self.place(*id) {
                self.running[at].lose_drafter();
            }
        }
    }

    /// What each sequence puts into the pass, and the buffer of drafts that are on the device.
    fn lay_out(
        &self,
        decoding: &[u64],
        asked: &[(u64, u32)],
        proposal: Option<Proposal>,
    ) -> (Vec<Part>, Option<Buffer>) {
        let vocab = self.model.vocab_size;
        let mut drafts: BTreeMap<u64, Draft> = BTreeMap::new();
        let mut places: BTreeMap<u64, (u32, u32)> = BTreeMap::new();
        let mut on_device = None;
        match proposal {
            Some(Proposal::Host(all)) => {
                for (draft, (id, _)) in all.into_iter().zip(asked) {
                    // Ids that are none are no drafts, nor is what stands behind them.
                    let usable = if draft.tokens.iter().all(|token| *token < vocab) {
                        draft
                    } else {
                        draft.filtered(|node| draft.tokens[node as usize] < vocab)
                    };
                    drafts.insert(*id, usable);
                }
            }
            Some(Proposal::Device { ids, stride, counts }) => {
                for ((place, count), (id, width)) in (0..).zip(&counts).zip(asked) {
                    places.insert(*id, (place * stride, (*count).min(*width)));
                }
                on_device = Some(ids);
            }
            _ => {}
        }
        let mut first_row = 0;
        let parts = decoding
            .iter()
            .map(|id| {
                let on_device = places.get(id).copied();
                let draft = drafts.remove(id).unwrap_or_default();
                let rows = 1 + on_device.map_or(draft.len() as u32, |(_, count)| count);
                let part = Part { id: *id, first_row, rows, draft, on_device };
                first_row += rows;
                part
            })
            .collect();
        (parts, on_device)
    }

    /// Records what the host must know of the rows of each request (its place, and how many rows).
    fn ask(&self, commands: &mut Commands, rows: &[(usize, u32)]) -> Result<Answers, EngineError> {
        let total: u32 = rows.iter().map(|(_, rows)| rows).sum();
        let best = match rows.iter().any(|(at, _)| self.running[*at].takes_best()) {
            true => {
                let best = self.runner.best(commands, total)?;
                Some(commands.read_back(best)?)
            }
            false => None,
        };
        let mut first = 0;
        let mut logits = Vec::new();
        for (at, rows) in rows {
            logits.push(match self.running[*at].takes_best() {
                true => None,
                false => Some(commands.read_back(self.runner.logits(first, *rows)?)?),
            });
            first += rows;
        }
        Ok(Answers { best, logits })
    }

    /// Verdicts on the drafts of a pass, and what follows from them; answers what became of each.
    fn judge(
        &mut self,
        parts: Vec<Part>,
        read: Option<&[u32]>,
        answers: &Answered,
        begun: Instant,
        drafted_in: Duration,
    ) -> Result<Vec<SequenceObserved>, EngineError> {
        let vocab = self.model.vocab_size as usize;
        let page_size = self.page_size() as u32;
        let mut commits: Vec<(u64, Vec<u32>, u32)> = Vec::new();
        let mut moves: Vec<[u32; 2]> = Vec::new();
        let mut observed: Vec<SequenceObserved> = Vec::new();
        let drafted_parts = parts.iter().filter(|part| part.rows > 1).count().max(1) as u32;
        let verified_in = begun.elapsed() - drafted_in;
        for (place, mut part) in parts.into_iter().enumerate() {
            let Some(at) = self.place(part.id) else { continue };
            let one = &self.running[at];
            let anchor = one.tokens.len() - 1;
            if let (Some(_), Some(read)) = (part.on_device, read) {
                let ids = &read[part.first_row as usize..][..part.rows as usize];
                if ids[0] != one.tokens[anchor] {
                    // The pass began with another token than the last one committed: nothing of it counts.
                    let what = format!("it put token {:?} in the place of the anchor {}", ids[0], one.tokens[anchor]);
                    let proposer = self.drafting.as_ref().map_or("", |drafting| drafting.name);
                    self.lose_drafter(&[part.id], &ProposerError::Plugin { proposer, what });
                    continue;
                }
                let usable = ids[1..].iter().take_while(|id| (**id as usize) < vocab).count();
                part.draft = ids[1..=usable].to_vec().into();
            }
            let answer = answers.of(place, part.first_row, part.rows, vocab);
            let verification = Verification::new(&part.draft, &one.tokens, &one.request.sampling, answer);
            let judged = match &self.drafting {
                Some(drafting) if !part.draft.is_empty() => contained(|| drafting.rule.accept(&verification))
                    .map_err(|message| drafting.rule_fault(format!("it panicked in accept: {message}"))),
                _ => Ok(polyattn_api::AcceptanceRule::accept(&Match, &verification)),
            };
            let Accepted { nodes, bonus } = match judged {
                Ok(accepted) => accepted,
                Err(error) => {
                    self.fail_one(part.id, error.into());
                    continue;
                }
            };
            let mut before = None;
            let is_path = nodes.iter().all(|node| {
                let goes_on = (*node as usize) < part.draft.len() && part.draft.parent(*node) == before;
                before = Some(*node);
                goes_on
            });
            if !is_path {
                let what = format!("it kept nodes {nodes:?} of {}, which are no path", part.draft);
                if let Some(error) = self.drafting.as_ref().map(|drafting| drafting.rule_fault(what)) {
                    self.fail_one(part.id, error.into());
                }
                continue;
            }
            let last_row = nodes.last().map_or(0, |node| node + 1);
            if let Err(error) = self.check_finite(&answer, last_row, anchor + nodes.len()) {
                self.fail_one(part.id, error);
                continue;
            }
            let mut tokens: Vec<u32> = nodes.iter().map(|node| part.draft.tokens[*node as usize]).collect();
            tokens.push(bonus);
            let one = &mut self.running[at];
            one.steps += 1;
            let (count, stop) = one.emit(&tokens, self.context as usize);
            // What an end token cut off does not count.
            let accepted = nodes.len().min(count);
            let depth = part.draft.depths().into_iter().max().unwrap_or(0);
            if let Some(counts) = &mut one.counts
                && !part.draft.is_empty()
            {
                counts.step(part.draft.len(), depth as usize, accepted);
                counts.took(drafted_in / drafted_parts, verified_in / drafted_parts);
                meter::verified(part.draft.len(), accepted);
            }
            observed.push(SequenceObserved {
                sequence: part.id,
                drafted: depth,
                accepted: accepted as u32,
                rows: part.rows,
            });
            self.events.push(Event { request: RequestId(part.id), what: Happened::Tokens(tokens[..count].to_vec()) });
            let kept = nodes.len() + 1;
            let one = &mut self.running[at];
            // Of what an end token cut off, keys and values are there as well.
            one.computed = (anchor + kept).min(one.tokens.len());
            for (place, node) in (1..).zip(&nodes) {
                if node + 1 != place {
                    let slot = |row: u32| {
                        let position = anchor as u32 + row;
                        let page = one.pages[(position / page_size) as usize];
                        page as u32 * page_size + position % page_size
                    };
                    moves.push([slot(node + 1), slot(place)]);
                }
            }
            if let Some(stop) = stop {
                self.finish(at, stop);
                continue;
            }
            if one.drafts {
                let rows = std::iter::once(0).chain(nodes.iter().map(|node| node + 1));
                commits.push((part.id, rows.map(|row| part.first_row + row).collect(), anchor as u32));
            }
        }
        if !moves.is_empty() {
            let mut commands = self.recording()?;
            self.runner.move_slots(&mut commands, &self.kernels, &moves)?;
            // At once: a drafter that fails takes its recording with it, and these must not be lost.
            commands.flush()?;
            self.recorded = Some(commands);
        }
        self.commit(&commits)?;
        Ok(observed)
    }

    /// Tells the drafter which rows of the last pass stand.
    fn commit(&mut self, commits: &[(u64, Vec<u32>, u32)]) -> Result<(), EngineError> {
        if commits.is_empty() {
            return Ok(());
        }
        let mut commands = self.recording()?;
        let Some(drafting) = &mut self.drafting else { return Ok(()) };
        let committed: Vec<CommittedRows<'_>> = commits
            .iter()
            .filter_map(|(id, rows, position)| {
                let one = self.running.iter().find(|one| one.id == *id)?;
                Some(CommittedRows::new(*id, rows, *position, &one.tokens, &one.pages))
            })
            .collect();
        let mut outcome = Outcome::new(&mut commands, &committed, self.runner.taps(), &self.runner);
        let begun = Instant::now();
        let told = drafting.drafter.commit(&mut outcome);
        self.times.models += begun.elapsed();
        match told {
            Ok(()) => {
                // At once, as the moves: what is recorded next may be dropped, or run over the taps that this reads.
                commands.flush()?;
                self.recorded = Some(commands);
                for (id, rows, position) in commits {
                    if let Some(at) = self.place(*id) {
                        self.running[at].committed = *position as usize + rows.len();
                    }
                }
            }
            Err(error) => {
                let ids: Vec<u64> = commits.iter().map(|(id, ..)| *id).collect();
                self.lose_drafter(&ids, &error);
            }
        }
        Ok(())
    }

    /// Logits that are NaN throughout have no largest one, which shows as an id beyond the vocabulary. Nothing of them
    /// is emitted.
    fn check_finite(&self, answer: &TargetRows<'_>, row: u32, position: usize) -> Result<(), EngineError> {
        let row = row as usize;
        let finite = match answer {
            TargetRows::Best(ids) => ids.get(row).is_some_and(|id| *id < self.model.vocab_size),
            TargetRows::Logits { logits, vocab } => {
                logits.get(row * vocab..(row + 1) * vocab).is_some_and(|row| row.iter().any(|x| !x.is_nan()))
            }
            _ => true,
        };
        if finite {
            return Ok(());
        }
        Err(EngineError::NotFinite { position, backends: self.kernels.names(Role::Target) })
    }
}

impl Answers {
    fn wait(self) -> Result<Answered, EngineError> {
        Ok(Answered {
            best: self.best.map(Readback::wait_as::<u32>).transpose()?.unwrap_or_default(),
            logits: self
                .logits
                .into_iter()
                .map(|logits| logits.map(Readback::wait_as::<f32>).transpose())
                .collect::<Result<_, _>>()?,
        })
    }
}

/// The answers of a pass.
struct Answered {
    best: Vec<u32>,
    logits: Vec<Option<Vec<f32>>>,
}

impl Answered {
    /// Of the part in this place, whose rows these are.
    fn of(&self, place: usize, first_row: u32, rows: u32, vocab: usize) -> TargetRows<'_> {
        match self.logits.get(place) {
            Some(Some(logits)) => TargetRows::Logits { logits, vocab },
            _ => TargetRows::Best(self.best.get(first_row as usize..(first_row + rows) as usize).unwrap_or(&[])),
        }
    }
}

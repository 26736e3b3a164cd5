//! Requests of commands. Who may ask what is decided before they come here.

use std::collections::BTreeSet;

use crcoord_common::ids::{JobId, JobKey, MemberId, NodeName};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::{Event, Request};
use crcoord_common::wire::member::{Command, JobSpec, NetworkMode, Owner, Placement, Stdio};

use crate::action::ClientId;
use crate::checkpoint::CheckpointRequest;
use crate::coordinator::Coordinator;
use crate::job::{Activity, Job};
use crate::placement;
use crate::probe::Probe;
use crate::refusal;
use crate::restoring::RestartRequest;
use crate::views;

/// Most members a job may have: far above any real cluster, and a bound on what one request can
/// make the coordinator hold.
const MEMBERS_LIMIT: usize = 16_384;

impl Coordinator {
    /// A command asks.
    pub(crate) fn asked(
        &mut self,
        client: ClientId,
        caller: Owner,
        privileged: bool,
        request: Request,
    ) {
        match request {
            Request::Run {
                job,
                nodes,
                command,
                groups,
                stdio,
                network,
                run_lease_ms,
                attach,
            } => {
                let spec = JobSpec {
                    owner: Owner { groups, ..caller },
                    command: Some(command),
                    stdio,
                    network,
                    run_lease_ms,
                    members: nodes.len() as u32,
                };
                match self.new_job(&job, spec, &nodes) {
                    Ok(mut job) => {
                        job.start(&mut self.core, client, attach);
                        self.jobs.insert(job.key.clone(), job);
                    }
                    Err(reasons) => self.refuse(client, reasons),
                }
            }
            Request::Checkpoint {
                job,
                adopt,
                kill,
                wait,
                reset_external_tcp,
            } => {
                let request = CheckpointRequest {
                    kill,
                    wait,
                    reset_external_tcp,
                };
                match adopt {
                    Some((node, pid)) => self.adopt(client, &caller, &job, node, pid, request),
                    None => self.with_job(client, &job, |core, job| {
                        job.open_checkpoint(core, Some(client), request);
                    }),
                }
            }
            Request::Restart {
                job,
                epoch,
                nodes,
                confirmed_dead,
                attach,
            } => {
                if !confirmed_dead.is_empty() && !privileged {
                    let report = Report::new(
                        "restart-word-denied",
                        Class::Denied,
                        "only root and operators may declare nodes dead",
                    );
                    return self.refuse(client, vec![report.remedy("ask an operator")]);
                }
                let living = self.living(self.newest(&job).as_ref());
                let request = RestartRequest {
                    epoch,
                    nodes,
                    confirmed: confirmed_dead.into_iter().collect(),
                    attach,
                };
                self.with_job(client, &job, |core, job| {
                    job.open_restart(core, client, request, &living);
                });
            }
            Request::List => {
                let jobs = self.jobs.values();
                let all = |job: &&Job| privileged || job.spec.owner.uid == caller.uid;
                let jobs = jobs
                    .filter(all)
                    .map(|job| views::job_info(&self.core, job))
                    .collect();
                self.answer_durably(client, Event::Jobs(jobs));
            }
            Request::Show { job } => match self.newest(&job).and_then(|key| self.jobs.get(&key)) {
                Some(job) => {
                    let jobs = vec![views::job_info(&self.core, job)];
                    self.answer_durably(client, Event::Jobs(jobs));
                }
                None => self.refuse(client, vec![refusal::unknown_job(&job)]),
            },
            Request::Status => {
                let event = Event::Cluster {
                    term: self.core.leadership.term().0,
                    uptime_s: self.core.now.0 / 1000,
                    nodes: self.node_infos(),
                };
                self.answer_durably(client, event);
            }
            Request::Check { nodes } => {
                let all: BTreeSet<NodeName> = match nodes.is_empty() {
                    true => self
                        .core
                        .nodes
                        .iter()
                        .map(|(name, _)| name.clone())
                        .collect(),
                    false => nodes.into_iter().collect(),
                };
                let probe = Probe::open(&mut self.core, client, all);
                self.probes.insert(client, probe);
                self.finish_probes();
            }
            Request::CheckJob { job } => self.with_job(client, &job, |core, job| {
                job.open_survey(core, client);
            }),
            Request::Abort { job } => {
                let by = caller.uid;
                self.with_job(client, &job, |core, job| {
                    job.abort_checkpoint(core, vec![asked_to("aborted", by)]);
                    if let Activity::Committing { .. } = job.activity {
                        let refused = refusal::busy(&job.key, "its epoch is being committed");
                        return core.fail(core.outbox.last(), Some(client), vec![refused]);
                    }
                    core.tell_after(core.outbox.last(), Some(client), Event::Done, true);
                });
            }
            Request::Kill { job } => {
                let by = caller.uid;
                self.with_job(client, &job, |core, job| job.kill(core, client, by));
            }
            Request::Attach { job } => self.with_job(client, &job, |core, job| {
                job.watch(core, client);
                job.tell_if_over(core);
            }),
        }
    }

    /// Answers the probes that are through.
    pub(crate) fn finish_probes(&mut self) {
        let now = self.core.now;
        let core = &mut self.core;
        self.probes
            .retain(|client, probe| match probe.finished(now) {
                Some(findings) => {
                    core.tell(Some(*client), Event::Findings(findings), true);
                    false
                }
                None => true,
            });
    }

    fn with_job(
        &mut self,
        client: ClientId,
        id: &JobId,
        act: impl FnOnce(&mut crate::core::Core, &mut Job),
    ) {
        match self.newest(id).and_then(|key| self.jobs.get_mut(&key)) {
            Some(job) => act(&mut self.core, job),
            None => self.refuse(client, vec![refusal::unknown_job(id)]),
        }
    }

    fn refuse(&mut self, client: ClientId, reasons: Vec<Report>) {
        let last = self.core.outbox.last();
        self.core.fail(last, Some(client), reasons);
    }

    /// Tells only what is durable.
    fn answer_durably(&mut self, client: ClientId, event: Event) {
        let last = self.core.outbox.last();
        self.core.tell_after(last, Some(client), event, true);
    }

    fn adopt(
        &mut self,
        client: ClientId,
        caller: &Owner,
        id: &JobId,
        node: NodeName,
        pid: i32,
        request: CheckpointRequest,
    ) {
        let spec = JobSpec {
            owner: caller.clone(),
            command: None,
            stdio: Stdio::Files {
                output: "/dev/null".to_owned(),
                error: "/dev/null".to_owned(),
            },
            network: NetworkMode::Host,
            run_lease_ms: None,
            members: 1,
        };
        match self.new_job(id, spec, &[node]) {
            Ok(mut job) => {
                job.adopt(&mut self.core, client, pid, caller.uid, request);
                self.jobs.insert(job.key.clone(), job);
            }
            Err(reasons) => self.refuse(client, reasons),
        }
    }

    /// A job with addresses, not started yet, or all that is in its way.
    fn new_job(&self, id: &JobId, spec: JobSpec, nodes: &[NodeName]) -> Result<Job, Vec<Report>> {
        let mut reasons = check_spec(&spec, nodes);
        reasons.extend(placement::distinct_and_living(nodes, &self.living(None)));
        let old = self.newest(id).and_then(|key| self.jobs.get(&key));
        if let Some(old) = old
            && !(old.is_over() && old.is_idle())
        {
            reasons.push(refusal::job_exists(&old.key));
        }
        if !reasons.is_empty() {
            return Err(reasons);
        }
        let addresses = match spec.network {
            NetworkMode::Virtual => {
                let pool = &self.core.settings.pool;
                pool.allocate(nodes.len(), &self.taken(), self.last_address())
            }
            NetworkMode::Host => {
                let bulk = |node| self.core.nodes.bulk(node).map(|bulk| bulk.ip());
                nodes.iter().map(bulk).collect()
            }
        };
        let Some(addresses) = addresses else {
            return Err(vec![refusal::no_addresses(nodes.len())]);
        };
        let placements = nodes.iter().zip(addresses).enumerate();
        let placements = placements.map(|(index, (node, address))| Placement {
            member: MemberId(index as u32),
            node: node.clone(),
            address,
        });
        let key = JobKey {
            cluster: self.core.settings.cluster.clone(),
            id: id.clone(),
            submitted: self
                .core
                .unix()
                .max(old.map_or(0, |old| old.key.submitted + 1)),
        };
        Ok(Job::new(key, spec, placements.collect()))
    }

    /// Virtual addresses of jobs that run, or that may be restarted with the same ones.
    /// The last address that was given out.
    fn last_address(&self) -> Option<std::net::IpAddr> {
        let virtual_jobs = self
            .jobs
            .values()
            .filter(|job| job.spec.network == NetworkMode::Virtual);
        let newest = virtual_jobs.max_by_key(|job| (job.key.submitted, &job.key))?;
        newest.placements.last().map(|at| at.address)
    }

    fn taken(&self) -> BTreeSet<std::net::IpAddr> {
        let jobs = self.jobs.values();
        let living = jobs.filter(|job| !job.is_over() || !job.committed.is_empty());
        living
            .flat_map(|job| job.placements.iter().map(|at| at.address))
            .collect()
    }
}

impl Job {
    fn kill(&mut self, core: &mut crate::core::Core, client: ClientId, by: u32) {
        match &self.activity {
            Activity::Committing { .. } | Activity::Ending { .. } => {
                let refused = self.refuse_busy().into_iter().collect();
                return core.fail(core.outbox.last(), Some(client), refused);
            }
            Activity::Starting { .. } => self.start_failed(core, vec![asked_to("killed", by)]),
            Activity::Checkpoint(_) => {
                self.abort_checkpoint(core, vec![asked_to("killed", by)]);
            }
            Activity::Restart(_) => self.fail_restart(core, vec![asked_to("killed", by)]),
            Activity::Survey { client, .. } => {
                let other = *client;
                self.end_survey(core);
                core.fail(core.outbox.last(), other, vec![asked_to("killed", by)]);
            }
            Activity::Idle => {}
        }
        self.end_all(core, Some(client), Event::Done);
    }
}

fn asked_to(what: &str, by: u32) -> Report {
    Report::new(
        "job-stopped",
        Class::Aborted,
        format!("{what} at the request of uid {by}"),
    )
}

fn check_spec(spec: &JobSpec, nodes: &[NodeName]) -> Vec<Report> {
    let mut reasons = Vec::new();
    if nodes.is_empty() {
        let what = "the job has no nodes";
        reasons.push(refusal::usage(
            "run-no-nodes",
            what,
            "name at least one with --nodes",
        ));
    }
    if nodes.len() > MEMBERS_LIMIT {
        let what = format!("the job has more than {MEMBERS_LIMIT} nodes");
        reasons.push(refusal::usage(
            "run-too-many-nodes",
            &what,
            "use fewer nodes",
        ));
    }
    let empty = |command: &Command| command.arguments.first().is_none_or(String::is_empty);
    if spec.command.as_ref().is_some_and(empty) {
        let what = "the job has no program";
        reasons.push(refusal::usage(
            "run-no-program",
            what,
            "give the program after --",
        ));
    }
    if spec.run_lease_ms.is_some_and(|lease_ms| lease_ms < 1_000) {
        let what = "a run lease below one second cannot be kept";
        reasons.push(refusal::usage(
            "run-lease-short",
            what,
            "ask for at least 1 s",
        ));
    }
    reasons
}

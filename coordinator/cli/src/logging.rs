//! Logs of the daemons on standard error: one line an event, `key=value` for journald or JSON.

use std::fmt;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::context::Context;
use crate::failure::Failure;

/// Sets logging up for this process, once.
pub fn start(context: &Context) -> Result<(), Failure> {
    let filter = EnvFilter::try_new(&context.log)
        .map_err(|error| Failure::usage(format!("--log {:?}: {error}", context.log)))?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match context.log_json {
        true => builder.json().flatten_event(true).try_init(),
        false => builder.event_format(KeyValue::of_process()).try_init(),
    }
    .map_err(|error| Failure::internal("cannot set up logging", &error))
}

/// `time=... level=info target=... message="..." key=value`.
struct KeyValue {
    /// Left out where journald adds it, as it does host and pid.
    time: bool,
}

impl KeyValue {
    fn of_process() -> Self {
        // systemd sets it for services whose output goes to the journal (systemd.exec(5)).
        KeyValue {
            time: std::env::var_os("JOURNAL_STREAM").is_none(),
        }
    }
}

impl<S, N> FormatEvent<S, N> for KeyValue
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if self.time {
            writer.write_str("time=")?;
            SystemTime.format_time(&mut writer)?;
            writer.write_char(' ')?;
        }
        let metadata = event.metadata();
        let level = metadata.level().as_str().to_ascii_lowercase();
        write!(writer, "level={level} target={}", metadata.target())?;
        let mut visitor = Pairs {
            writer: &mut writer,
            result: Ok(()),
        };
        event.record(&mut visitor);
        visitor.result?;
        writeln!(writer)
    }
}

struct Pairs<'a, 'w> {
    writer: &'a mut Writer<'w>,
    result: fmt::Result,
}

impl Pairs<'_, '_> {
    fn pair(&mut self, name: &str, value: &str) {
        let plain = !value.is_empty()
            && value
                .chars()
                .all(|c| !c.is_whitespace() && !c.is_control() && c != '"' && c != '=');
        self.result = self.result.and_then(|()| match plain {
            true => write!(self.writer, " {name}={value}"),
            false => write!(self.writer, " {name}={value:?}"),
        });
    }
}

impl Visit for Pairs<'_, '_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.pair(field.name(), value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.pair(field.name(), &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, Write};
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_event_is_one_line_of_pairs() {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt()
            .event_format(KeyValue { time: false })
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(target: "t", node = %"n1", path = "a b", count = 3, "two\nlines");
        });
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert_eq!(
            text,
            "level=info target=t message=\"two\\nlines\" node=n1 path=\"a b\" count=3\n"
        );
    }
}

//! The options of a prune request: checked by the very parser of `evop prune`, before the job is taken.

use crate::openai::errors::ApiError;
use clap::ArgAction;
use serde_json::{Map, Value};

/// Options that are the server's to give.
const RESERVED: [&str; 15] = [
    "model",
    "revision",
    "device",
    "dtype",
    "threads",
    "out",
    "resume",
    "progress",
    "json",
    "calibration",
    "calibration-set",
    "levels",
    "format",
    "help",
    "version",
];

/// Checks names and values against `command`, which is `evop prune`'s.
///
/// # Errors
/// 400 that names the option and says what was expected.
pub fn check(options: &Map<String, Value>, command: &clap::Command) -> Result<(), ApiError> {
    for (name, value) in options {
        let param = format!("options.{name}");
        let flag = name.replace('_', "-");
        let known = command.get_arguments().find(|a| a.get_long() == Some(&flag)).filter(|_| !RESERVED.contains(&flag.as_str()));
        let Some(argument) = known else {
            let names: Vec<String> =
                command.get_arguments().filter_map(clap::Arg::get_long).filter(|l| !RESERVED.contains(l)).map(|l| l.replace('-', "_")).collect();
            return Err(ApiError::invalid(&param, format!("{param}: no such option; there are {}", names.join(", "))));
        };
        let is_switch = matches!(argument.get_action(), ArgAction::SetTrue);
        let fits = match value {
            Value::Bool(_) => is_switch,
            Value::String(_) | Value::Number(_) => !is_switch,
            _ => false,
        };
        if !fits {
            let expected = if is_switch { "true or false" } else { "a string or a number" };
            return Err(ApiError::invalid(&param, format!("{param}: expected {expected}, found {value}")));
        }
        let single: Map<String, Value> = [(name.clone(), value.clone())].into_iter().collect();
        let words = ["prune".into(), "--out".into(), "x".into()].into_iter().chain(as_arguments(&single));
        if let Err(error) = command.clone().try_get_matches_from(words) {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
            return Err(ApiError::invalid(&param, format!("{param}: {first}")));
        }
    }
    Ok(())
}

/// As they stand on a command line. `--name=value` in one word, so that no value can be taken for an option.
pub fn as_arguments(options: &Map<String, Value>) -> Vec<String> {
    let argument = |(name, value): (&String, &Value)| {
        let flag = name.replace('_', "-");
        match value {
            Value::Bool(true) => Some(format!("--{flag}")),
            Value::Bool(false) | Value::Null => None,
            Value::String(text) => Some(format!("--{flag}={text}")),
            other => Some(format!("--{flag}={other}")),
        }
    };
    options.iter().filter_map(argument).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Arg, Command, value_parser};
    use serde_json::json;

    fn command() -> Command {
        Command::new("prune")
            .arg(Arg::new("out").long("out"))
            .arg(Arg::new("generations").long("generations").value_parser(value_parser!(u16)))
            .arg(Arg::new("sequence_length").long("sequence-length"))
            .arg(Arg::new("uniform").long("uniform").action(ArgAction::SetTrue))
    }

    fn options(value: Value) -> Map<String, Value> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn options_become_flags() {
        let given = options(json!({"sequence_length": 64, "preset": "paper", "uniform": true, "quiet": false}));
        assert_eq!(as_arguments(&given), ["--sequence-length=64", "--preset=paper", "--uniform"]);
    }

    #[test]
    fn what_the_command_would_not_take_is_refused_by_name() {
        let refused = |value: Value| check(&options(value), &command()).unwrap_err().to_json()["error"]["param"].as_str().unwrap().to_string();
        assert_eq!(refused(json!({"generations": "many"})), "options.generations");
        assert_eq!(refused(json!({"generations": true})), "options.generations");
        assert_eq!(refused(json!({"uniform": 1})), "options.uniform");
        assert_eq!(refused(json!({"out": "/etc"})), "options.out");
        assert_eq!(refused(json!({"mystery": 1})), "options.mystery");
        assert_eq!(refused(json!({"sequence_length": [1]})), "options.sequence_length");
        assert!(check(&options(json!({"generations": 3, "sequence_length": 64, "uniform": true})), &command()).is_ok());
    }
}

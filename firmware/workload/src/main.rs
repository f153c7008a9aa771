//! The workload program of `husk bench`. The implementation is in the library, where it can be tested.

fn main() {
    let words: Vec<String> = std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    std::process::exit(husk_workload::run(&words).into());
}

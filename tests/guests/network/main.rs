//! A program of Rust's standard library, for wasm32-wasip2: what a user would write.
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs, UdpSocket};

fn serve(address: &str) -> std::io::Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("listening on {}", listener.local_addr()?);
    let datagrams = UdpSocket::bind(address)?;
    datagrams.set_nonblocking(true)?;
    for connection in listener.incoming() {
        let mut connection = connection?;
        let mut text = String::new();
        connection.read_to_string(&mut text)?;
        fs::write("/data/last", &text)?;
        connection.write_all(text.to_uppercase().as_bytes())?;
        let mut datagram = [0; 1500];
        if let Ok((size, from)) = datagrams.recv_from(&mut datagram) {
            datagrams.send_to(&datagram[..size], from)?;
        }
    }
    Ok(())
}

fn ask(address: &str) -> std::io::Result<()> {
    let mut connection = TcpStream::connect(address)?;
    connection.set_nodelay(true)?;
    connection.write_all(&fs::read("/data/question")?)?;
    connection.shutdown(Shutdown::Write)?;
    let mut text = String::new();
    connection.read_to_string(&mut text)?;
    print!("{text}");
    Ok(())
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let outcome = match arguments[1].as_str() {
        "serve" => serve(&arguments[2]),
        "ask" => ask(&arguments[2]),
        _ => (arguments[2].as_str(), 80)
            .to_socket_addrs()
            .map(|found| found.for_each(|address| println!("{address}"))),
    };
    if let Err(error) = outcome {
        println!("{:?}", error.kind());
        std::process::exit(1);
    }
}

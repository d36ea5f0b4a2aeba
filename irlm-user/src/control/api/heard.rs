//! A request as it is heard: a line of bytes from whoever reached the port. It is parsed straight into the request that it
//! names. Nothing is kept of what that request does not have, so a line takes the memory of its typed form and no more.
//!
//! Bounds: the line's bytes ([`super::MAX_LINE`], kept by `control::lines`), and how deep it is nested.

use super::{Code, Refusal, Request, RequestByName, VERSION};
use serde::de::value::StrDeserializer;
use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error as _, IgnoredAny, IntoDeserializer as _, MapAccess,
    VariantAccess, Visitor,
};
use serde::{Deserialize, forward_to_deserialize_any};
use std::cell::Cell;
use std::fmt;

/// Arrays and objects inside of each other: a `prepare` with everything has nine.
const MAX_DEPTH: usize = 32;
/// Bytes of a request's name that are said back.
const NAMED: usize = 40;

/// What every version of the protocol has.
#[derive(Deserialize)]
struct Versioned {
    #[serde(default)]
    v: Option<u64>,
}

/// Which request it is.
#[derive(Deserialize)]
struct Envelope {
    req: Named,
}

#[derive(Deserialize)]
struct Named {
    #[serde(rename = "do")]
    name: String,
}

/// Reads a request line.
pub fn decode_request(line: &[u8]) -> Result<Request, Refusal> {
    let bad = |what: String| Refusal::new(Code::BadRequest, what);
    if is_deep(line) {
        return Err(bad(format!("nested more than {MAX_DEPTH} deep")));
    }
    let versioned: Versioned = serde_json::from_slice(line).map_err(|e| bad(format!("not JSON: {e}")))?;
    if versioned.v != Some(u64::from(VERSION)) {
        let asked = versioned.v.map_or_else(|| "none".to_owned(), |v| v.to_string());
        let what = format!("control protocol version {VERSION} here, {asked} asked");
        return Err(Refusal::new(Code::Version, what));
    }
    let envelope: Envelope = serde_json::from_slice(line).map_err(|e| bad(format!("no request: {e}")))?;
    let name = envelope.req.name;
    let unknown = Cell::new(false);
    let mut json = serde_json::Deserializer::from_slice(line);
    let heard = Body { name: &name, unknown: &unknown }.deserialize(&mut json);
    let heard = heard.and_then(|request| json.end().map(|()| request));
    heard.map_err(|e| {
        let name = name.get(..name.floor_char_boundary(NAMED)).unwrap_or_default();
        if unknown.get() {
            Refusal::new(Code::UnknownRequest, format!("this agent does not know the request {name:?}"))
        } else {
            bad(format!("request {name:?}: {e}"))
        }
    })
}

/// Whether brackets outside of strings are nested too deep. What is no JSON is found later.
fn is_deep(line: &[u8]) -> bool {
    let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
    for byte in line {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return true;
        }
    }
    false
}

/// The whole line, of which the request is to be had.
struct Body<'a> {
    name: &'a str,
    unknown: &'a Cell<bool>,
}

impl<'de> DeserializeSeed<'de> for Body<'_> {
    type Value = Request;

    fn deserialize<D: Deserializer<'de>>(self, line: D) -> Result<Request, D::Error> {
        line.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Body<'_> {
    type Value = Request;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with a request")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut line: A) -> Result<Request, A::Error> {
        let mut request = None;
        while let Some(key) = line.next_key::<String>()? {
            if key != "req" {
                line.next_value::<IgnoredAny>()?;
            } else if request.is_some() {
                return Err(A::Error::duplicate_field("req"));
            } else {
                request = Some(line.next_value_seed(Fields { name: self.name, unknown: self.unknown })?);
            }
        }
        request.ok_or_else(|| A::Error::missing_field("req"))
    }
}

/// The request's own object, of which the name is known.
struct Fields<'a> {
    name: &'a str,
    unknown: &'a Cell<bool>,
}

impl<'de> DeserializeSeed<'de> for Fields<'_> {
    type Value = Request;

    fn deserialize<D: Deserializer<'de>>(self, object: D) -> Result<Request, D::Error> {
        RequestByName::deserialize(Tagged { name: self.name, unknown: self.unknown, object })
    }
}

/// An object that stands for the variant that its own `do` names.
struct Tagged<'a, D> {
    name: &'a str,
    unknown: &'a Cell<bool>,
    object: D,
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for Tagged<'_, D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, D::Error> {
        Err(D::Error::custom("a request is an object"))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        known: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        if !known.contains(&self.name) {
            self.unknown.set(true);
            return Err(D::Error::custom("not known"));
        }
        visitor.visit_enum(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

impl<'de, D: Deserializer<'de>> EnumAccess<'de> for Tagged<'_, D> {
    type Error = D::Error;
    type Variant = Content<D>;

    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, Content<D>), D::Error> {
        let name: StrDeserializer<'_, D::Error> = self.name.into_deserializer();
        Ok((seed.deserialize(name)?, Content(self.object)))
    }
}

/// A variant's fields, among which `do` counts for nothing any more.
struct Content<D>(D);

impl<'de, D: Deserializer<'de>> VariantAccess<'de> for Content<D> {
    type Error = D::Error;

    fn unit_variant(self) -> Result<(), D::Error> {
        self.0.deserialize_map(IgnoredAny).map(drop)
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, D::Error> {
        seed.deserialize(self.0)
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, D::Error> {
        Err(D::Error::custom("a request has named fields"))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(visitor)
    }
}
